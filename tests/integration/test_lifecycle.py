"""One loop for the command line, for Python, for one process and for several."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

import lvlm_prune
from lvlm_prune.blocks import BlockRunner
from lvlm_prune.callbacks import BlockwisePruning, PruneCallback
from lvlm_prune.checkpoints import CheckpointFolder
from lvlm_prune.cli import main
from lvlm_prune.data import TensorSource
from lvlm_prune.methods.pools import AsymmetricPool, MixedPool, TextOnlyPool
from lvlm_prune.methods.scorers import MagnitudeScorer
from tests.conftest import ALL_SAMPLES, GOLDEN, MODEL, REPOSITORY

CALIBRATION = GOLDEN / "calib.safetensors"


def golden_model(dtype=torch.float32):
    return AutoModelForImageTextToText.from_pretrained(MODEL, dtype=dtype)


def test_streamed_result_is_byte_identical_to_the_one_in_memory(golden_arguments, tmp_path):
    assert main([*golden_arguments, ALL_SAMPLES, f"--output={tmp_path / 'streamed'}"]) == 0
    model = golden_model()
    lvlm_prune.prune(model, TensorSource(str(CALIBRATION)), BlockwisePruning(sparsity=0.5))
    streamed = AutoModelForImageTextToText.from_pretrained(tmp_path / "streamed", dtype=torch.float32)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, streamed.state_dict()[name]), name
        if ".layers." in name and name.endswith("proj.weight"):
            assert not torch.signbit(weight[weight == 0]).any()


class ForwardCounter(PruneCallback):
    def __init__(self):
        self.per_block = []

    def on_block_end(self, trainer, pl_module, block):
        self.per_block.append(block.forwards)


@pytest.mark.parametrize(
    ("pool", "scorer", "most"),
    [(AsymmetricPool(), None, 2), (MixedPool(), None, 2), (MixedPool(), MagnitudeScorer(), 0)],
)
def test_two_block_forwards_per_sample_not_three(pool, scorer, most):
    model, counter = golden_model(), ForwardCounter()
    pruning = BlockwisePruning(pool=pool) if scorer is None else BlockwisePruning(pool=pool, scorer=scorer)
    calls = []
    for block in BlockRunner(model).decoder.layers:
        block.self_attn.register_forward_hook(lambda *_: calls.append(1))
    lvlm_prune.prune(model, TensorSource(str(CALIBRATION)), pruning, callbacks=[counter])
    samples = 8
    assert max(counter.per_block) == most * samples
    assert len(calls) <= most * samples * 2


def test_two_pass_selection_equals_the_three_pass_definition():
    """ATV as the paper defines it: measure all drifts, then the budget, then the norms of text and top-K tokens."""
    alpha, model, reference = 4.0, golden_model(), golden_model()
    source = TensorSource(str(CALIBRATION))
    pruning = BlockwisePruning(sparsity=0.5, pool=AsymmetricPool(alpha=alpha))
    lvlm_prune.prune(model, source, pruning)
    runner = BlockRunner(reference)
    batches = [runner.catch(source[index]) for index in range(len(source))]
    visual = [(batch.input_ids == reference.config.image_token_id)[0] for batch in batches]
    for index in range(len(runner)):
        outputs = [runner.run(index, batch) for batch in batches]
        drifts = [
            1 - torch.cosine_similarity(batch.hidden[0], output[0], dim=-1)[where]
            for batch, output, where in zip(batches, outputs, visual)
        ]
        mean = torch.cat(drifts).mean().item()
        block = runner.block(index)
        linears = {name: module for name, module in block.named_modules() if isinstance(module, torch.nn.Linear)}
        norms = dict.fromkeys(linears, 0.0)
        for batch, drift, where in zip(batches, drifts, visual):
            chosen = ~where
            budget = min(len(drift), int(alpha * mean * int(chosen.sum())))
            chosen[where.nonzero().flatten()[drift.topk(budget).indices]] = True
            inputs = {}
            hooks = [
                module.register_forward_pre_hook(lambda _, args, name=name, to=inputs: to.__setitem__(name, args[0][0]))
                for name, module in linears.items()
            ]
            runner.run(index, batch)
            for hook in hooks:
                hook.remove()
            for name, value in inputs.items():
                norms[name] = norms[name] + value[chosen].double().square().sum(0)
        for name, module in linears.items():
            score = module.weight.abs().double() * norms[name].sqrt()
            lowest = score.argsort(dim=1, stable=True)[:, : score.shape[1] // 2]
            module.weight.data.scatter_(1, lowest, 0.0)
        for batch in batches:
            runner.advance(index, batch)
    different = sum(int(((a == 0) != (b == 0)).sum()) for a, b in zip(model.parameters(), reference.parameters()))
    assert different <= 1e-4 * 172_000


def test_batches_of_several_samples_give_the_same_masks(golden_arguments, tmp_path):
    """Padding belongs to no pool: neither the statistics nor the selected tokens depend on the batch size."""
    for size in (1, 3):
        arguments = [f"--data.batch_size={size}", "--data.num_samples=5", "--pruning.record=true"]
        arguments.append(f"--output={tmp_path / str(size)}")
        assert main([*golden_arguments, *arguments]) == 0
    one, three = (load_file(tmp_path / size / "statistics.safetensors") for size in ("1", "3"))
    assert one.keys() == three.keys()
    for key, value in one.items():
        if key.startswith("sel."):
            assert torch.equal(value, three[key]), key
        elif not key.startswith("image_mask."):
            torch.testing.assert_close(three[key], value, rtol=1e-5, atol=1e-6)


def test_many_shards_stay_the_same_shards(tmp_path, golden_arguments):
    golden_model().save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    arguments = [argument for argument in golden_arguments if "model.path" not in argument]
    arguments += [f"--model.path={tmp_path / 'sharded'}", f"--output={tmp_path / 'out'}"]
    (tmp_path / "sharded" / "other.safetensors").write_bytes((GOLDEN / "calib.safetensors").read_bytes())
    assert main(arguments) == 0
    before, after = CheckpointFolder(tmp_path / "sharded"), CheckpointFolder(tmp_path / "out")
    assert len(before.shards) > 5
    assert before.shards == after.shards
    assert before.tensors == after.tensors
    for shard in before.shards:
        assert (before.path / shard).stat().st_size == (after.path / shard).stat().st_size
    assert (tmp_path / "out" / "other.safetensors").read_bytes() == (GOLDEN / "calib.safetensors").read_bytes()


def test_bfloat16_weights_that_stay_are_the_stored_bytes(tmp_path, golden_arguments):
    """Also when blocks run in another precision than the one on disk."""
    golden_model(torch.bfloat16).save_pretrained(tmp_path / "bf16")
    arguments = [argument for argument in golden_arguments if "model.path" not in argument]
    arguments += [f"--model.path={tmp_path / 'bf16'}", "--model.dtype=float32", f"--output={tmp_path / 'out'}"]
    assert main(arguments) == 0
    before, after = CheckpointFolder(tmp_path / "bf16"), CheckpointFolder(tmp_path / "out")
    changed = [key for key in before if before.read_bytes(key) != after.read_bytes(key)]
    assert len(changed) == 14
    for key in changed:
        dense, sparse = before.read(key), after.read(key)
        assert sparse.dtype == torch.bfloat16
        assert torch.equal(sparse, torch.where(sparse == 0, 0, dense))


def test_excluded_linears_stay_dense_and_the_manifest_says_what_was_done(tmp_path, golden_arguments):
    output = tmp_path / "out"
    assert (
        main([*golden_arguments, "--pruning.exclude=*.down_proj", "--pruning.sparsity=0.6", f"--output={output}"]) == 0
    )
    manifest = json.loads((output / "pruning.json").read_text())
    assert manifest["status"] == "complete"
    assert len(manifest["linears"]) == 12
    assert not any(name.endswith("down_proj") for name in manifest["linears"])
    weights = load_file(output / "model.safetensors")
    for name, entry in manifest["linears"].items():
        weight = next(
            value for key, value in weights.items() if name.endswith(key.split("model.")[-1].removesuffix(".weight"))
        )
        assert entry["zeros"] == int((weight == 0).sum()) == weight.shape[0] * int(weight.shape[1] * 0.6)
    assert manifest["calibration"]["num_samples"] == 2
    assert [block["index"] for block in manifest["blocks"]] == [0, 1]
    assert all(len(block["visual_tokens"]) == 2 and block["mean_drift"] > 0 for block in manifest["blocks"])


def test_the_configuration_that_a_run_writes_repeats_it(tmp_path, golden_arguments):
    first, second = tmp_path / "first", tmp_path / "second"
    arguments = ["--pruning.pattern=2:4", "--pruning.pool.alpha=2.5", "--pruning.exclude=*.k_proj"]
    assert main([*golden_arguments, *arguments, f"--output={first}"]) == 0
    assert main(["prune", f"--config={first / 'config.yaml'}", f"--output={second}"]) == 0
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()
    one, two = (json.loads((folder / "pruning.json").read_text()) for folder in (first, second))
    assert one["method"] == two["method"]
    assert one["method"]["init_args"]["pattern"] == "2:4"


@pytest.mark.parametrize("recipe", sorted(path.name for path in (REPOSITORY / "configs" / "prune").glob("*.yaml")))
def test_every_recipe_runs(recipe, tmp_path, golden_arguments):
    output = tmp_path / "out"
    config = REPOSITORY / "configs" / "prune" / recipe
    few = ["--data.num_samples=3"]
    assert main([*golden_arguments, f"--config={config}", *few, f"--output={output}"]) == 0
    manifest = json.loads((output / "pruning.json").read_text())
    assert manifest["sparsity"]["achieved"] == pytest.approx(0.5, abs=0.01)
    assert manifest["method"]["init_args"]["name"]


PLUGIN = '''
import torch
from lvlm_prune.methods.saliency import Saliency
from lvlm_prune.methods.scorers import WandaScorer

class LoudSaliency(Saliency):
    """Norm of the output."""
    name = "loudness"
    def __init__(self, scale: float = 1.0):
        self.scale = scale
    def __call__(self, tokens):
        return self.scale * tokens.hidden_out[tokens.visual].float().norm(dim=-1)

class BrokenScorer(WandaScorer):
    def score(self, weight, statistic):
        raise IndexError("a mistake of the plugin's author")
'''


def test_a_class_in_the_users_own_file_works_by_its_path(run_cli, golden_arguments, tmp_path):
    (tmp_path / "mine.py").write_text(PLUGIN)
    (tmp_path / "callbacks.py").write_text("raise RuntimeError('must not shadow lvlm_prune.callbacks')")
    plugin = ["--pruning.pool.saliency=mine.LoudSaliency", "--pruning.pool.saliency.scale=0.01"]
    finished = run_cli(*golden_arguments, *plugin, "--output=out")
    assert finished.returncode == 0, finished.stderr
    blocks = json.loads((tmp_path / "out" / "pruning.json").read_text())["blocks"]
    assert all(block["mean_loudness"] > 0 for block in blocks)


def test_an_exception_inside_a_plugin_keeps_its_traceback(run_cli, golden_arguments, tmp_path):
    (tmp_path / "mine.py").write_text(PLUGIN)
    finished = run_cli(*golden_arguments, "--pruning.scorer=mine.BrokenScorer", "--output=out")
    assert finished.returncode == 1
    assert "Traceback" in finished.stderr
    assert "mine.py" in finished.stderr
    assert "a mistake of the plugin's author" in finished.stderr


def test_importing_the_package_does_not_import_torch():
    import subprocess

    code = "import lvlm_prune, sys; assert 'torch' not in sys.modules; print(lvlm_prune.__version__)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip()


def test_text_only_samples_have_a_budget_of_zero(tmp_path):
    ids = torch.arange(5, 45)
    model = golden_model()
    source = TensorSource(str(CALIBRATION))
    text_sample = {"input_ids": ids[None], "mm_token_type_ids": torch.zeros(1, 40, dtype=torch.int64)}
    manifest = lvlm_prune.prune(
        model, [source_sample(source, 0), text_sample], BlockwisePruning(pool=AsymmetricPool(alpha=8))
    )
    assert all(block["visual_tokens"][1] == 0 < block["visual_tokens"][0] for block in manifest["blocks"])
    alone = golden_model()
    text_only = golden_model()
    lvlm_prune.prune(alone, [text_sample], BlockwisePruning(pool=AsymmetricPool()))
    lvlm_prune.prune(text_only, [text_sample], BlockwisePruning(pool=TextOnlyPool()))
    assert all(torch.equal(a, b) for a, b in zip(alone.parameters(), text_only.parameters()))


def source_sample(source: TensorSource, index: int) -> dict:
    source.setup()
    return dict(source[index])


def test_the_input_checkpoint_is_never_written(golden_arguments, tmp_path):
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in MODEL.iterdir()}
    assert main([*golden_arguments, f"--output={tmp_path / 'out'}"]) == 0
    assert before == {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in MODEL.iterdir()}
