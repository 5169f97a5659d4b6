"""The private names of other packages that hf_tpp touches, and whether they are still there.

Each has one line here, with what it is touched for. A name that moves fails under its own name, and so does a method
that is changed, private or not; a private name that is touched and not listed fails too.
"""

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from accelerate import Accelerator
from transformers import AutoConfig, AutoModelForCausalLM

from hf_tpp import parallelize
from hf_tpp.adapters.methods import METHODS
from hf_tpp.errors import ConfigurationError
from hf_tpp.integrations.accelerator import ACCELERATOR_CHANGES
from hf_tpp.integrations.trainer import TRAINER_CHANGES, TRAINER_CREATION
from hf_tpp.parallel_model import parallel_state

PACKAGE = Path(__file__).parents[2] / "hf_tpp"

# module: class.name -> what for
NAMES = {
    "accelerate.accelerator: Accelerator._models": "save_state and load_state: what is parallel is set aside",
    "accelerate.accelerator: Accelerator._optimizers": "the same",
    "accelerate.accelerator: Accelerator._schedulers": "load_state: schedules count replicas",
    "accelerate.accelerator: Accelerator._is_accelerate_prepared": "a loader is prepared once",
    "transformers.trainer: Trainer._load_best_model": "changed: each rank loads its part",
    "transformers.trainer: Trainer._load_from_checkpoint": "changed: the same",
    "transformers.trainer: Trainer._load_optimizer_and_scheduler": "changed: one training checkpoint of all ranks",
    "transformers.trainer: Trainer._save_optimizer_and_scheduler": "changed: the same",
    "transformers.trainer: Trainer._load_rng_state": "changed: generators continue at another layout",
    "transformers.trainer: Trainer._train_batch_size": "resuming: is it what the arguments say?",
    "transformers.modeling_utils: PreTrainedModel._init_weights": "values of models that start on meta",
    "transformers.modeling_utils: PreTrainedModel._can_record_outputs": "which modules are routers",
    "transformers.modeling_utils: PreTrainedModel._keys_to_ignore_on_save": "what a checkpoint leaves out",
    "transformers.modeling_utils: PreTrainedModel._keys_to_ignore_on_load_unexpected": "what a checkpoint may hold",
    "transformers.modeling_layers: GradientCheckpointingLayer._gradient_checkpointing_func": "reentrant is refused",
    "transformers.models.gpt_oss.modeling_gpt_oss: GptOssExperts._apply_gate": "how gate and up lie in fused experts",
    "transformers.masking_utils: find_packed_sequence_indices": "changed in passes whose answer is known",
    "transformers.masking_utils: is_tracing": "changed while a CUDA graph is recorded",
    "torch.nn.modules.module: _has_any_global_hook": "passes that somebody watches are not recorded",
    "torch.nn.modules.module: Module._apply": "overridden: replicas that share weights move together",
    "torch.nn.modules.module: Module._buffers": "buffers that are filled anew",
    "torch.nn.modules.module: Module._forward_hooks": "modules with hooks cannot be cut",
    "torch.nn.modules.module: Module._forward_pre_hooks": "the same",
    "torch.nn.modules.module: Module._load_from_state_dict": "overridden: biases that a rank does not have",
    "torch.nn.modules.module: Module._modules": "children by name",
    "torch.nn.modules.module: Module._non_persistent_buffers_set": "which buffers a checkpoint holds",
    "torch.nn.modules.module: Module._parameters": "parameters by name",
    "torch.nn.modules.module: Module._save_to_state_dict": "overridden: the residual of the norm is in no checkpoint",
    "torch: _foreach_add_": "sums of gradients in few kernels",
    "torch: _foreach_zero_": "the same",
    "torch: Tensor._backward_hooks": "kept from the backwards inside a pass",
    "torch.autograd: Variable._execution_engine": "queue_callback: what follows the last gradient",
    "torch.nn.modules.dropout: _DropoutNd": "all kinds of dropout",
    "torch._dynamo.config: skip_nnmodule_hook_guards": "a compiled block is shared by blocks with and without hooks",
    "torch._dynamo.exc: FailOnRecompileLimitHit": "the same, of a further shape",
    "torch._dynamo.exc: TorchDynamoException": "what cannot be compiled runs plain, where nobody asked for it",
    "torch.utils._pytree: tree_flatten": "arguments of blocks",
    "torch.utils._pytree: tree_map": "the same",
}
LISTED = {part for name in NAMES for part in re.split(r"[.: ]+", name) if part.startswith("_")}


STANDARD_LIBRARY = {"_exit"}

CHANGED = [
    *(f"accelerate.accelerator: Accelerator.{name}" for name in ACCELERATOR_CHANGES),
    *(f"transformers.trainer: Trainer.{name}" for name in (*TRAINER_CREATION, *TRAINER_CHANGES)),
    *(f"{owner.rpartition('.')[0]}: {owner.rpartition('.')[2]}.{name}" for owner, name in METHODS),
]


@pytest.mark.parametrize("name", sorted({*NAMES, *CHANGED}))
def test_the_name_is_still_there(name):
    module_name, _, path = name.partition(": ")
    if module_name.startswith("peft"):
        pytest.importorskip("peft")
    module = importlib.import_module(module_name)
    owner_name, _, attribute = path.rpartition(".")
    owner = getattr(module, owner_name) if owner_name else module
    # What only objects have is set somewhere in the source.
    assert hasattr(owner, attribute) or re.search(rf"\w\.{attribute}\b", inspect.getsource(module)), name


def test_a_method_that_has_gone_is_named(monkeypatch):
    monkeypatch.delattr(Accelerator, "save_state")
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", n_layer=1, n_head=1, n_embd=8, vocab_size=9))
    with pytest.raises(ConfigurationError, match=r"Accelerator of accelerate \d.* has no save_state, which"):
        parallelize(model, verbose=False)
    assert parallel_state(model) is None
    parallelize(model, patch=False, verbose=False)


def is_private(name: str) -> bool:
    return re.fullmatch(r"_[A-Za-z]\w*", name) is not None and not name.startswith("_hf_tpp")


def names_of_our_own(tree: ast.AST) -> Iterator[str]:
    """What classes of ours define, and set on their objects."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            for part in node.body:
                if isinstance(part, ast.FunctionDef | ast.ClassDef):
                    yield part.name
                elif isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
                    yield part.target.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            yield node.attr


def names_touched(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Private attributes, whether after a dot or in `getattr`, keys of changes, and imports."""
    for node in ast.walk(tree):
        found: list[str] = []
        if isinstance(node, ast.Attribute):
            found = [node.attr]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id.endswith("attr"):
            found = [part.value for part in node.args[1:2] if isinstance(part, ast.Constant)]
        elif isinstance(node, ast.Dict):
            found = [key.value for key in node.keys if isinstance(key, ast.Constant) and isinstance(key.value, str)]
        elif isinstance(node, ast.Import):
            found = [part for alias in node.names for part in alias.name.split(".")]
        elif isinstance(node, ast.ImportFrom):
            found = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        yield from ((name, node.lineno) for name in found if is_private(name))


def test_nothing_else_is_touched():
    own: set[str] = set()
    touched: dict[str, str] = {}
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        own |= set(names_of_our_own(tree))
        touched |= {name: f"{path.relative_to(PACKAGE)}:{line}" for name, line in names_touched(tree)}
    assert {name: place for name, place in touched.items() if name not in own | LISTED | STANDARD_LIBRARY} == {}
    assert LISTED - touched.keys() - own == set(), "listed, and not touched"
