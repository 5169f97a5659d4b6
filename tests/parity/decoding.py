"""What transformers' `generate` can do with a decoder, each as a function of a model that returns tensors."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, GenerationConfig, StaticCache
from transformers.generation.logits_process import LogitsProcessor, LogitsProcessorList
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from tests.parity.models import VOCABULARY, tiny_model

Model = Any
Strategy = Callable[[Model], torch.Tensor]
GREEDY = {"do_sample": False, "max_new_tokens": 6}
SAMPLED = {"do_sample": True, "top_k": 0, "temperature": 1.5, "max_new_tokens": 5}


def build(name: str) -> nn.Module:
    """A model whose blocks change much, so that texts do not repeat one token."""
    model = tiny_model(name, 3).eval()
    with torch.no_grad():
        for parameter in model.get_decoder().parameters():
            if parameter.dim() > 1 and parameter is not model.get_input_embeddings().weight:
                parameter.mul_(5)
    return model


def prompts(rows: int, seq: int = 7, padding: bool = False) -> dict[str, torch.Tensor]:
    """Token ids, with padding on the left if asked for."""
    input_ids = torch.randint(3, VOCABULARY, (rows, seq), generator=torch.Generator().manual_seed(11))
    attention_mask = torch.ones_like(input_ids)
    if padding:
        for row in range(1, rows):
            attention_mask[row, :row] = 0
    return {"input_ids": input_ids.where(attention_mask.bool(), 0), "attention_mask": attention_mask}


def greedy(model: Model) -> torch.Tensor:
    return model.generate(**prompts(1), **GREEDY)


def greedy_without_cache(model: Model) -> torch.Tensor:
    return model.generate(**prompts(2), **GREEDY, use_cache=False)


def greedy_with_padding(model: Model) -> torch.Tensor:
    return model.generate(**prompts(4, padding=True), **GREEDY)


def greedy_with_padding_without_cache(model: Model) -> torch.Tensor:
    return model.generate(**prompts(3, padding=True), **GREEDY, use_cache=False)


def sampling(model: Model) -> torch.Tensor:
    torch.manual_seed(21)
    return model.generate(**prompts(3, padding=True), **SAMPLED)


def sampling_twice(model: Model) -> torch.Tensor:
    """The generator goes on after the first call as it does for the plain model."""
    torch.manual_seed(22)
    return torch.cat([model.generate(**prompts(1), **SAMPLED, num_return_sequences=2) for _ in range(2)])


def sampling_from_few(model: Model) -> torch.Tensor:
    torch.manual_seed(23)
    return model.generate(**prompts(2), do_sample=True, top_k=20, top_p=0.9, min_p=0.01, max_new_tokens=5)


def beams(model: Model) -> torch.Tensor:
    return model.generate(**prompts(2, padding=True), **GREEDY, num_beams=3)


def several_beams(model: Model) -> torch.Tensor:
    options = {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.5, "early_stopping": True}
    return model.generate(**prompts(2), **GREEDY, **options)


def sampled_beams(model: Model) -> torch.Tensor:
    torch.manual_seed(24)
    return model.generate(**prompts(2, padding=True), **SAMPLED, num_beams=3)


def prompt_lookup(model: Model) -> torch.Tensor:
    ids = prompts(1)["input_ids"]
    return model.generate(torch.cat([ids, ids], dim=1), **GREEDY, prompt_lookup_num_tokens=3)


def assisted(model: Model) -> torch.Tensor:
    return model.generate(**prompts(1), **GREEDY, assistant_model=_assistant())


def assisted_sampling(model: Model) -> torch.Tensor:
    assistant = _assistant()
    torch.manual_seed(25)
    return model.generate(**prompts(1), **SAMPLED, assistant_model=assistant)


def _assistant() -> nn.Module:
    """Near to the larger one, so that some of its tokens are right and some wrong."""
    generator = torch.Generator().manual_seed(2)
    assistant = build("llama_gqa")
    with torch.no_grad():
        for parameter in assistant.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return assistant


def static_cache(model: Model) -> torch.Tensor:
    return model.generate(**prompts(2), **GREEDY, cache_implementation="static")


def static_cache_with_padding(model: Model) -> torch.Tensor:
    return model.generate(**prompts(3, padding=True), **GREEDY, cache_implementation="static")


def cache_of_the_caller(model: Model) -> torch.Tensor:
    dynamic = DynamicCache(config=model.config)
    static = StaticCache(config=model.config, max_cache_len=20)
    return torch.cat([model.generate(**prompts(2), **GREEDY, past_key_values=cache) for cache in (dynamic, static)])


def continued(model: Model) -> torch.Tensor:
    """A second call goes on from the first one's cache."""
    first = model.generate(**prompts(2), **GREEDY, return_dict_in_generate=True)
    return model.generate(first.sequences, **GREEDY, past_key_values=first.past_key_values)


def chunked_prefill(model: Model) -> torch.Tensor:
    return model.generate(**prompts(3, padding=True), **GREEDY, prefill_chunk_size=3)


def from_embeddings(model: Model) -> torch.Tensor:
    embeds = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(12)) / 4
    return model.generate(inputs_embeds=embeds, **GREEDY)


def guided(model: Model) -> torch.Tensor:
    """The processor calls the model itself, with a cache of its own."""
    return model.generate(**prompts(2), **GREEDY, guidance_scale=1.5)


def scores(model: Model) -> torch.Tensor:
    found = model.generate(
        **prompts(2),
        **GREEDY,
        repetition_penalty=1.3,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
    )
    return torch.stack([*found.scores, *found.logits]).clamp(min=-1e4)


def scores_of_beams(model: Model) -> torch.Tensor:
    found = model.generate(
        **prompts(2), **GREEDY, num_beams=3, return_dict_in_generate=True, output_scores=True, output_logits=True
    )
    transitions = model.compute_transition_scores(found.sequences, found.scores, found.beam_indices)
    return torch.cat([found.sequences_scores, transitions.flatten(), torch.stack(found.logits).flatten()])


class _NoEvenTokens(LogitsProcessor):
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[:, ::2] = float("-inf")
        return scores


class _EnoughTokens(StoppingCriteria):
    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return input_ids.sum(dim=1) > 600


def processors(model: Model) -> torch.Tensor:
    return model.generate(
        **prompts(3, padding=True),
        **GREEDY,
        logits_processor=LogitsProcessorList([_NoEvenTokens()]),
        no_repeat_ngram_size=1,
        bad_words_ids=[[7], [9, 11]],
        min_new_tokens=4,
    )


def stopping(model: Model) -> torch.Tensor:
    """Rows end at different steps: by a criterion, and by any of some end tokens."""
    options = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0}
    ends = list(range(3, 30))
    criteria = StoppingCriteriaList([_EnoughTokens()])
    return model.generate(**prompts(4), **options, eos_token_id=ends, stopping_criteria=criteria)


def one_token(model: Model) -> torch.Tensor:
    return model.generate(**prompts(3, padding=True), do_sample=False, max_new_tokens=1)


def from_one_token(model: Model) -> torch.Tensor:
    """A prompt of one token, and one of none: the start token alone."""
    given = model.generate(torch.tensor([[5]]), **GREEDY)
    none = model.generate(**GREEDY)
    return torch.cat([given, none])


def by_configuration(model: Model) -> torch.Tensor:
    configuration = GenerationConfig(max_length=11, do_sample=False, num_beams=2, pad_token_id=0, eos_token_id=2)
    return model.generate(**prompts(2), generation_config=configuration)


class _Listener(BaseStreamer):
    def __init__(self) -> None:
        self.heard: list[torch.Tensor] = []

    def put(self, value: torch.Tensor) -> None:
        self.heard.append(value.flatten())

    def end(self) -> None:
        self.heard.append(torch.tensor([-1]))


def streamed(model: Model) -> torch.Tensor:
    listener = _Listener()
    model.generate(**prompts(1), **GREEDY, streamer=listener)
    return torch.cat(listener.heard)


def own_loop(model: Model, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
    """A `custom_generate` of the caller, which calls the model as a whole."""
    for _ in range(3):
        logits = model(input_ids=input_ids, use_cache=False).logits[:, -1]
        input_ids = torch.cat([input_ids, logits.argsort(dim=1)[:, -2:-1]], dim=1)
    return input_ids


def by_an_own_loop(model: Model) -> torch.Tensor:
    return model.generate(**prompts(2), custom_generate=own_loop, max_new_tokens=3)


STRATEGIES: list[Strategy] = [
    greedy,
    greedy_without_cache,
    greedy_with_padding,
    greedy_with_padding_without_cache,
    sampling,
    sampling_twice,
    sampling_from_few,
    beams,
    several_beams,
    sampled_beams,
    prompt_lookup,
    assisted,
    assisted_sampling,
    static_cache,
    static_cache_with_padding,
    cache_of_the_caller,
    continued,
    chunked_prefill,
    from_embeddings,
    guided,
    scores,
    scores_of_beams,
    processors,
    stopping,
    one_token,
    from_one_token,
    by_configuration,
    streamed,
    by_an_own_loop,
]
