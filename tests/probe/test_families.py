"""The probe beside the table of names, on all families of transformers: what both know, they cut alike."""

from collections.abc import Iterator

import pytest

from hf_tpp.check.families import FamilyKind, causal_families, kind_of
from hf_tpp.check.tiny_model import Recipe, build_model, quiet
from hf_tpp.errors import HfTppError
from hf_tpp.parts import ModelParts
from hf_tpp.plan.rules import RegionRule
from hf_tpp.tensor_parallel.probe import probe_regions
from hf_tpp.tensor_parallel.rewrite import plan_rewrite
from tests.probe.models import pieces

TP = 2
AGREEMENTS = 0.87
"""Of the kinds of modules that the table knows, the share that the probe cuts alike; 249 of 278 in 5.23."""
KNOWN_BY_PROBE_ALONE = {
    "Phi4MultimodalAttention",
    "MoshiAttention",
    "MoshiGatingMLP",
    "Mamba2Mixer",
    "NemotronHMamba2Mixer",
    "ZambaMambaMixer",
    "Zamba2MLP",
    "ZayaRouterMLP",
}
LIMITS = (
    "is given a KVSharingDict",  # keys and values of other layers travel in an object
    "indexer",  # a choice of tokens, without a gradient
    "no channels of its linears belong to heads or neurons",  # norms over all channels, which the table gathers
    "hidden states reach the result beside the row",  # CPM-Ant's residual connection
    "more than its first output is used",
    "summed over the ranks, differs",  # masks and convolutions over all heads
    "does not run without its weights",  # RWKV scales its weights in place
    "comes from shared_expert",
)


def cuts_of(rule: RegionRule) -> dict[str, list[list[int]]]:
    """Columns and parameters with the channels of each rank; what all ranks hold whole is left out."""
    layouts = rule.columns | {name: cut.layout for name, cut in rule.tensors.items()} | {rule.row: rule.row_layout}
    ranks = {name: pieces(layout, TP) for name, layout in layouts.items()}
    return {name: cut for name, cut in ranks.items() if any(rank != cut[0] for rank in cut)}


def compare(family: str) -> Iterator[tuple[str, str, str]]:
    """Class of a module, what was found, why."""
    with quiet():
        try:
            model = build_model(Recipe(family))
            parts = ModelParts.find(model)
            known = plan_rewrite(model, parts, TP).regions
        except (HfTppError, ImportError):
            return
        probed = probe_regions(model, parts, model.config.get_text_config(), TP, (), include_shipped=True)
    for name in {**known, **probed.rules}:
        kind, ours, found = type(model.get_submodule(name)).__name__, known.get(name), probed.rules.get(name)
        if ours is None:
            yield kind, "probe alone", ""
        elif found is not None:
            yield kind, "same" if cuts_of(ours) == cuts_of(found) else "different", ""
        elif ours.row and not ours.at_columns:  # else stacked experts, or linears beside others: none for the probe
            yield kind, "table alone", reason_for(name, probed.declined)


def reason_for(name: str, declined: dict[str, str]) -> str:
    return next((why for other, why in declined.items() if f"{name}.".startswith(f"{other}.")), "not looked at")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_probe_and_the_table_agree(capsys):
    found = {
        (family, *entry)
        for family in causal_families()
        if kind_of(family) in (FamilyKind.DECODER_ONLY, FamilyKind.COMPOSITE)
        for entry in compare(family)
    }
    same = [entry for entry in found if entry[2] == "same"]
    others = sorted(found - set(same))
    with capsys.disabled():
        print(f"\n{len(same)} kinds of modules are cut alike; {len(others)} are not:")
        print(*(f"  {family:24} {kind:28} {how:12} {why}" for family, kind, how, why in others), sep="\n")
    assert [entry for entry in others if entry[2] == "different"] == []
    assert {kind for _, kind, how, _ in others if how == "probe alone"} <= KNOWN_BY_PROBE_ALONE
    by_table = [entry for entry in others if entry[2] == "table alone"]
    assert [entry for entry in by_table if not any(limit in entry[3] for limit in LIMITS)] == []
    assert len(same) >= AGREEMENTS * (len(same) + len(by_table)) > 150


def test_the_probe_and_the_table_agree_on_some_families():
    for family in ("codegen", "falcon", "deepseek_v3", "qwen3_next"):
        assert {how for _, how, _ in compare(family)} == {"same"}
