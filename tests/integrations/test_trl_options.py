"""What can be set on TRL's trainers, on a parallel model: exact at every step, or refused by name."""

import tempfile

import pytest

from hf_tpp.errors import ConfigurationError
from tests.integrations.runs import as_launched
from tests.integrations.test_trl import DP, DP_PP, PP, TP, TP_PP, alone, check
from tests.integrations.trl_runs import Way, dpo, model_of, quiet, settings, sft, texts, tokenizer, trainer_of
from tests.ranks import run_ranks

CHECKPOINTING = {"gradient_checkpointing": True}
SELECTIVE = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"selective": True}}
CASES = [
    *((Way("sft", "llama_gqa", evaluates=7), layout) for layout in (TP, PP, TP_PP, DP_PP)),
    *((Way("dpo", "gpt2", evaluates=8), layout) for layout in (PP, DP_PP)),
    *((sft(loss_type="dft"), layout) for layout in (TP, PP)),
    *((sft(label_smoothing_factor=0.1), layout) for layout in (TP_PP, DP)),
    *((Way("sft", "llama_gqa", loss_function=True), layout) for layout in (TP_PP, DP)),
    *((sft("gpt2", **CHECKPOINTING), layout) for layout in (TP, PP)),
    (sft(**SELECTIVE), TP_PP),
    (Way("dpo", "llama_gqa", lora=True, settings=tuple(CHECKPOINTING.items())), TP_PP),
    *((sft(packing=True, packing_strategy=strategy), TP_PP) for strategy in ("bfd", "wrapped")),
    (sft(padding_free=True, max_length=None), PP),
    (sft(average_tokens_across_devices=False), PP),
    *((Way("sft", "mixtral", options=(("num_microbatches", 1),)), layout) for layout in (TP, PP)),
    (Way("dpo", "mixtral", options=(("num_microbatches", 1),)), PP),
    (dpo(loss_type=["ipo"]), TP_PP),
    (dpo(loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.3]), PP),
    (dpo(use_weighting=True), PP),
    (dpo(ld_alpha=0.5, f_divergence_type="js_divergence"), TP),
    (Way("sft", "llama_gqa", options=(("sequence_parallel", True),), settings=(("pad_to_multiple_of", 2),)), TP_PP),
    (Way("sft", "llama_gqa", options=(("data_parallel", "fully_shard"),)), DP),
    (Way("dpo", "gpt2", options=(("data_parallel", "fully_shard"),)), DP_PP),
    (Way("sft", "llama_gqa", lora=True, options=(("patch", False),)), TP),
]


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4])
def test_equal_to_one_process(world_size, subtests):
    cases = [case for case in CASES if case[1].world_size == world_size]
    check(cases, alone(list(dict.fromkeys(way for way, _ in cases))), subtests)


def refused_settings() -> list[tuple[Way, str]]:
    """What a trainer with a parallel model does not take, and what the refusal says."""
    return [
        (sft(activation_offloading=True), "activation_offloading=True with a parallel model"),
        (sft(use_liger_kernel=True), "use_liger_kernel"),
        (dpo(sync_ref_model=True), "sync_ref_model=True with a parallel model"),
        (dpo(precompute_ref_log_probs=True), "precompute_ref_log_probs=True with a parallel model"),
        (
            Way("sft", "gpt2", settings=(("activation_offloading", True),), options=(("patch", False),)),
            "offloading=True",
        ),
    ]


def refuse() -> list[str]:
    """Body of a rank."""
    as_launched()
    quiet()
    said = []
    for way, _ in refused_settings():
        with tempfile.TemporaryDirectory() as folder, pytest.raises(ConfigurationError) as caught:
            trainer_of(way, DP, folder)
        said.append(str(caught.value))
    with pytest.raises(ConfigurationError) as caught:
        reward_optimization()
    said.append(str(caught.value))
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(Way("dpo", "gpt2", evaluates=7), DP, folder)
        with pytest.raises(ConfigurationError) as caught:
            trainer.evaluate()
    said.append(str(caught.value))
    return said


def reward_optimization() -> None:
    """Another trainer of TRL."""
    from trl import GRPOConfig, GRPOTrainer

    with tempfile.TemporaryDirectory() as folder:
        kept = ("output_dir", "use_cpu", "bf16", "report_to")
        given = {name: value for name, value in settings(DP, folder).items() if name in kept}
        GRPOTrainer(
            model=model_of("gpt2", DP),
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=GRPOConfig(**given, num_generations=2, per_device_train_batch_size=2),
            train_dataset=texts(("prompt",), 4),
            processing_class=tokenizer(),
        )


def test_what_cannot_be_exact_is_refused_by_name():
    patterns = [pattern for _, pattern in refused_settings()]
    patterns += ["GRPOTrainer of TRL with a parallel model", "a multiple of per_device_eval_batch_size x 2"]
    for said in run_ranks(refuse, 2, timeout=300):
        assert len(said) == len(patterns)
        for text, pattern in zip(said, patterns, strict=True):
            assert pattern in text
