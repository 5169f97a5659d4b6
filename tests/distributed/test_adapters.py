"""Adapters on a parallel model: saved, loaded, switched off, merged, generated with, and refused by name."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    IA3Config,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import hf_tpp
from hf_tpp.adapters import methods
from hf_tpp.errors import ConfigurationError, RankMismatchError, UnsupportedModelError
from hf_tpp.parallel_model import parallel_state
from tests.distributed.test_collectives import counting
from tests.parity.adapters import AdapterCase, build_parallel, build_plain, lora_config, start_values
from tests.parity.models import make_batch, tiny_model
from tests.ranks import run_ranks

MODELS = ("gpt2", "llama_gqa")


def logits_of(model) -> torch.Tensor:
    batch = make_batch(2, 8)
    del batch["labels"]
    with torch.no_grad():
        return model.eval()(**batch).logits[batch["attention_mask"].bool()]


def assert_close(ours: torch.Tensor, plain: torch.Tensor) -> None:
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


def life_of_an_adapter(folder: str, name: str, first: str) -> None:
    case = AdapterCase(name, first, tp=2, pp=2, config={"modules_to_save": ["ln_f" if name == "gpt2" else "norm"]})
    plain, ours = build_plain(case), build_parallel(case)
    saved = Path(folder) / f"{name}-{first}"
    assert_close(logits_of(ours), expected := logits_of(plain))
    with ours.disable_adapter(), plain.disable_adapter():
        assert_close(logits_of(ours), logits_of(plain))
    assert not torch.allclose(logits_of(tiny_model(name, 4)), expected, atol=1e-3)  # the adapter has an effect
    prompt = make_batch(1, 6)["input_ids"]
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert ours.generate(prompt, **options).tolist() == plain.generate(prompt, **options).tolist()
    # saved as one process saves it
    ours.save_pretrained(saved)
    plain.save_pretrained(alone := saved.with_name(f"plain-{saved.name}-{parallel_state(ours).mesh.global_rank}"))
    mine, theirs = (load_file(path / "adapter_model.safetensors") for path in (saved, alone))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in theirs)
    configs = [json.loads((path / "adapter_config.json").read_text()) for path in (saved, alone)]
    for config in configs:
        config["target_modules"].sort()
    assert configs[0] == configs[1]
    # plain peft and plain transformers load it; so does peft onto a parallel model
    assert_close(logits_of(PeftModel.from_pretrained(tiny_model(name, 4), saved)), expected)
    again = hf_tpp.parallelize(tiny_model(name, 4), tp=2, pp=2, verbose=False)
    again = PeftModel.from_pretrained(again, saved, is_trainable=True)
    assert_close(logits_of(again), expected)
    again.train()(**make_batch(4, 8)).loss.backward()
    assert any(parameter.grad is not None for key, parameter in again.named_parameters() if "lora_A" in key)
    # merged for a while, then for good: it is a plain model
    ours.merge_adapter()
    assert_close(logits_of(ours), expected)
    ours.unmerge_adapter()
    assert_close(logits_of(ours), expected)
    merged = ours.merge_and_unload()
    assert_close(logits_of(merged), expected)
    merged.save_pretrained(whole := saved.with_name(f"merged-{saved.name}"))
    assert_close(logits_of(AutoModelForCausalLM.from_pretrained(whole)), expected)


def lives(folder: str) -> None:
    for name in MODELS:
        for first in ("peft", "parallelize"):
            life_of_an_adapter(folder, name, first)

    warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`|fan_in_fan_out is set")
    head = AdapterCase("gpt2", "parallelize", tp=2, pp=2, config={"target_modules": ["lm_head"]})
    with pytest.raises(ConfigurationError, match=r"the adapter at lm_head cannot be merged"):
        build_parallel(head).merge_and_unload()


def test_saved_loaded_merged_generated(tmp_path):
    run_ranks(lives, 4, str(tmp_path), timeout=250.0)


def collectives() -> None:
    """Adapters on all linears cost no collective in a layer, and one sum for all of them in a step."""
    counts = {}
    for num_layers in (2, 3):
        for num_microbatches in (1, 3):
            model = tiny_model("gpt2", num_layers)
            model = hf_tpp.parallelize(model, tp=2, num_microbatches=num_microbatches, verbose=False).train()
            model = get_peft_model(model, lora_config(fan_in_fan_out=True))
            model(**(batch := make_batch(4, 8))).loss.backward()
            with counting(parallel_state(model).mesh.tp.group) as found:
                model(**batch).loss.backward()
            counts[num_layers, num_microbatches] = found["all_reduce"]
    for num_microbatches in (1, 3):
        assert counts[3, num_microbatches] - counts[2, num_microbatches] == 4 * num_microbatches
        # Embedding; head's input; loss: maximum, then sum and target together. The first region's input needs no
        # gradient.
        assert counts[2, num_microbatches] == (2 * 4 - 1 + 4) * num_microbatches + 1


def in_low_precision() -> None:
    """PEFT makes adapters of bfloat16 models float32, by new parameters: they are found again."""
    for first in ("peft", "parallelize"):
        ours = build_parallel(AdapterCase("llama_gqa", first, tp=2, dtype=torch.bfloat16))
        assert {p.dtype for p in ours.parameters() if p.requires_grad} == {torch.float32, torch.float64}
        ours(**make_batch(4, 8)).loss.backward()
        assert all(p.grad is not None for p in ours.parameters() if p.requires_grad)


def several() -> None:
    """A second adapter after training has begun, loaded, switched to and deleted."""
    ours = build_parallel(AdapterCase("gpt2", "parallelize", tp=2))
    plain = build_plain(AdapterCase("gpt2"))
    for model in (ours, plain):
        torch.manual_seed(7)
        model.add_adapter("second", lora_config(r=2, fan_in_fan_out=True))
        start_values(model)
        model.set_adapter("second")
    assert_close(logits_of(ours), logits_of(plain))
    for model in (ours, plain):
        model.delete_adapter("default")
    assert_close(logits_of(ours), logits_of(plain))
    assert not [name for name in parallel_state(ours).specs if ".default." in name]
    ours.train()(**make_batch(4, 8)).loss.backward()
    with pytest.raises(ConfigurationError, match=r"add_weighted_adapter computes .*combine saved adapters"):
        ours.base_model.add_weighted_adapter(["second"], [1.0], "third")
    with pytest.raises(ConfigurationError, match="merge_and_unload"):
        ours.get_base_model().save_pretrained("unused")
    with pytest.raises(ConfigurationError, match=r"safe_serialization=False.* is not supported"):
        ours.save_pretrained("unused", safe_serialization=False)


def dropout_masks() -> None:
    """The input of a column's additions is whole on each rank: the same elements drop. That of a row's is not."""
    for first in ("peft", "parallelize"):
        ours = build_parallel(AdapterCase("llama_gqa", first, tp=2, config={"lora_dropout": 0.5}))
        seen: dict[str, list[torch.Tensor]] = {"q_proj": [], "v_proj": [], "down_proj": []}
        for name, module in ours.named_modules():
            for layer, masks in seen.items():
                if ".0." in name and name.endswith(f".{layer}.lora_dropout.default"):
                    module.register_forward_hook(lambda _, args, out, masks=masks: masks.append(out == 0))
        ours(**make_batch(4, 8)).loss.backward()
        group = parallel_state(ours).mesh.tp.group
        for layer, masks in seen.items():
            assert masks, f"{layer} dropped nothing"
            theirs = [torch.zeros_like(masks[0]) for _ in range(2)]
            torch.distributed.all_gather(theirs, masks[0].contiguous(), group=group)
            assert torch.equal(*theirs) == (layer != "down_proj"), layer
        assert not torch.equal(seen["q_proj"][0], seen["v_proj"][0])


def refusals() -> None:
    def parallel(name: str = "llama_gqa", **options):
        return hf_tpp.parallelize(tiny_model(name, 4), tp=2, verbose=False, **options)

    with pytest.raises(ConfigurationError, match="adapters of the type IA3 cannot be cut"):
        get_peft_model(parallel(), IA3Config(task_type="CAUSAL_LM", target_modules=["v_proj"], feedforward_modules=[]))
    with pytest.raises(ConfigurationError, match="LoRA with use_dora=True is more than an addition"):
        get_peft_model(parallel(), lora_config(use_dora=True))
    with pytest.raises(ConfigurationError, match="init_lora_weights='pissa' is computed from whole weights"):
        get_peft_model(parallel(), lora_config(init_lora_weights="pissa"))
    with pytest.raises(UnsupportedModelError, match=r"model.embed_tokens is an embedding, and adapters"):
        get_peft_model(parallel(), lora_config(target_modules=["embed_tokens"]))
    with pytest.raises(UnsupportedModelError, match=r"lora_dropout=0.1 at .* use lora_dropout=0.0"):
        get_peft_model(parallel(sequence_parallel=True), lora_config(lora_dropout=0.1))
    large = tiny_model("gpt2", 2, vocab_size=4099)
    with pytest.raises(UnsupportedModelError, match=r"lm_head computes products for .* use parallelize\(align_voc"):
        get_peft_model(hf_tpp.parallelize(large, pp=2, verbose=False), lora_config(target_modules=["lm_head"]))
    large = hf_tpp.parallelize(tiny_model("gpt2", 2, vocab_size=4099), pp=2, align_vocabulary=False, verbose=False)
    get_peft_model(large, lora_config(target_modules=["lm_head"]))
    with pytest.raises(ConfigurationError, match="know nothing of shards"):
        parallel().add_adapter(LoraConfig())
    model = parallel()
    torch.manual_seed(torch.distributed.get_rank())
    with pytest.raises(RankMismatchError, match="weights of the adapters: rank 0 has"):
        get_peft_model(model, lora_config())

    def before(config, **options):
        torch.manual_seed(0)
        return hf_tpp.parallelize(get_peft_model(tiny_model("llama_gqa", 4), config), tp=2, verbose=False, **options)

    for config in (
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    ):
        with pytest.raises(UnsupportedModelError, match=f"{config.peft_type.value}.* no gradient from a pipeline pass"):
            before(config)
    with pytest.raises(UnsupportedModelError, match="only LoRA at the head can be split"):
        before(lora_config(modules_to_save=["embed_tokens"]))
    with pytest.raises(UnsupportedModelError, match=r"lora_dropout=0.1 at .* use lora_dropout=0.0"):
        before(lora_config(lora_dropout=0.1), sequence_parallel=True)
    with pytest.raises(ConfigurationError, match="parallel already"):
        hf_tpp.parallelize(before(lora_config()), tp=2)


def on_two_ranks() -> None:
    for body in (collectives, in_low_precision, several, dropout_masks, refusals):
        body()


def test_precision_several_adapters_dropout_refusals():
    run_ranks(on_two_ranks, 2, timeout=250.0)


def test_peft_without_parallelism_is_untouched(tmp_path):
    methods.install_methods()
    model = build_plain(AdapterCase("llama_gqa"))
    model.save_pretrained(tmp_path / "adapter")
    tiny_model("llama_gqa", 4).save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "model")
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config))
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert_close(logits_of(again), logits_of(model))
    assert_close(logits_of(again.merge_and_unload()), logits_of(model))


@pytest.mark.parametrize(("owner", "name"), methods.METHODS)
def test_names_of_peft_that_are_wrapped(owner, name):
    module, _, kind = owner.rpartition(".")
    assert callable(getattr(getattr(__import__(module, fromlist=[kind]), kind), name)), f"{owner}.{name} has moved"


def test_names_of_peft_that_are_read():
    """`hf_tpp.wrappers` knows PEFT's layers by these names."""
    from peft.tuners.lora.layer import Linear
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper

    model = get_peft_model(tiny_model("llama_gqa", 1), lora_config(modules_to_save=["norm"])).get_base_model()
    layer = model.model.layers[0].self_attn.q_proj
    assert type(layer) is Linear
    assert isinstance(layer, BaseTunerLayer)
    for name in ("base_layer", "lora_A", "lora_B", "lora_dropout", "lora_variant", "lora_bias"):
        assert hasattr(layer, name), f"peft.tuners.lora.layer.Linear.{name} has moved"
    wrapper = model.model.norm
    assert type(wrapper) is ModulesToSaveWrapper
    for name in ("original_module", "modules_to_save"):
        assert hasattr(wrapper, name), f"peft.utils.other.ModulesToSaveWrapper.{name} has moved"
