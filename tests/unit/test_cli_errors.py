"""What jsonargparse really says becomes one line that names option and value."""

import pytest
from jsonargparse import ArgumentError, ArgumentParser

from lvlm_prune.callbacks import BlockwisePruning
from lvlm_prune.cli import main
from lvlm_prune.cli_errors import ALONE, VERBS, explain


@pytest.mark.parametrize(
    ("argument", "line"),
    [
        ("--pruning.sparsity=abc", "--pruning.sparsity abc: expected float"),
        ("--pruning.record=maybe", "--pruning.record maybe: expected bool"),
        ("--pruning.pool.rounding=up", "--pruning.pool.rounding up: expected one of floor, released"),
        ("--pruning.pool.beta=1", "--pruning.pool.beta: unknown option"),
        ("--pruning.nothing=1", "--pruning.nothing: unknown option"),
        ("--pruning.scorer=no.such.Scorer", "--pruning.scorer no.such.Scorer: No module named 'no'"),
        ("--pruning.pool=NoPool", "--pruning.pool NoPool: no such class"),
    ],
)
def test_one_line(argument, line):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(BlockwisePruning, "pruning")
    with pytest.raises(ArgumentError) as raised:
        parser.parse_args([argument])
    assert explain(str(raised.value.message), [argument]).startswith(line)


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        ("prun", "prun: no such command, expected {} is prune meant?"),
        ("prune --pruning.scorer WandScorer", "--pruning.scorer WandScorer: no such class; is WandaScorer meant?"),
        ("prune --pruning.scorer AsymmetricPool", "--pruning.scorer AsymmetricPool: is a class of another kind"),
        ("prune --pruning.pool builtins.int", "--pruning.pool builtins.int: is no Pool"),
        ("prune --pruning.pool 5", "--pruning.pool 5: {}"),
        ("prune --pruning.pool.alhpa 2", "--pruning.pool.alhpa: unknown option; is --pruning.pool.alpha meant?"),
        ("prune --pruning.pool.saliency DriftSalency", "{}DriftSalency: no such class; is DriftSaliency meant?"),
        ("prune --pruning.pool.saliency.scal 2", "--pruning.pool.saliency.scal: unknown option{}"),
        ("prune --data.source LlavaJsonSorce", "{}; is LlavaJsonSource meant?"),
        ("prune --trainer.logger CSVLoger", "--trainer.logger CSVLoger: no such class; is CSVLogger meant?"),
        ("prune --trainer.logger CSVLogger --trainer.logger.nme a", "--trainer.logger.nme: {}.name meant?"),
        ("recover --trainer.callbacks EarlyStoping", "{} EarlyStoping: no such class; is EarlyStopping meant?"),
        ("pack --format coded2", "--format coded2: expected one of bitmask, coded; is coded meant?"),
        (
            "prune --model.path demo --data.source.path a.json",
            "--data.source.path: {} LlavaJsonSource, TensorSource and TextSource take it",
        ),
        (
            "evaluate --engine.benchmark LocalBenchmark --engine.benchmark.source.path a.json",
            "--engine.benchmark.source: is to be named first, a CalibrationSource: {}, TextSource",
        ),
        (
            'evaluate --engine.model_args {"images":1}',
            "--engine.model_args: {} of the class in use; LMEvalEngine and LMMSEvalEngine take it",
        ),
        (
            'prune --pruning.pool {"class_path":"AsymmetricPool","init_args":{"alph":2}}',
            "--pruning.pool.alph: {}; is --pruning.pool.alpha meant?",
        ),
        ("prune --trainer.acelerator cpu", "{}; is --trainer.accelerator meant?"),
        ("prune --config nowhere/configs/prune/atv.yaml", "--config {}by name: --method atv"),
        ("prune --modle.path x", "--modle.path: {}; is --model.path meant?"),
        ("recover --lroa.rnak 3", "--lroa.rnak: {}; is --lora.rank meant?"),
        (
            "prune --pruning.scorer lvlm_prune.methods.scorers.WandScorer",
            "{}; is lvlm_prune.methods.scorers.WandaScorer meant?",
        ),
        ("evaluate --engine BuiltinEngin", "{}; is BuiltinEngine meant?"),
        ("method", "method: no such command, expected {} is methods meant?"),
        ("methods wnda", "methods wnda: no such recipe; is wanda meant? {}"),
        ("methods wanda atv", "methods wanda atv: `methods` takes one name of a recipe, or nothing"),
        ('sweep --grid {"pruning.sparsty":0.5}', "--grid pruning.sparsty: {}; is pruning.sparsity meant?"),
        ('sweep --grid {"prunning.sparsity":0.5}', "--grid prunning.sparsity: {}; is pruning.sparsity meant?"),
        ('sweep --grid {"sparsity":0.5}', "--grid sparsity: {}; is pruning.sparsity meant?"),
        ('sweep --grid {"pruning.pool.alhpa":2}', "--grid pruning.pool.alhpa: {}; is pruning.pool.alpha meant?"),
        ("completion bsh", "completion bsh: name one shell of {}; is bash meant?"),
        ("prune --help-traner", "--help-traner: unknown option; is --help-trainer meant?"),
        ("--verison", "--verison: unknown option; is --version meant?"),
        ("recover --optimization.lr 0.1", "--optimization.lr: {}; is --optimization.learning_rate meant?"),
        ("recover --lr 0.1", "--lr: unknown option; is --optimization.learning_rate meant?"),
        ("recover --lora.r 8", "--lora.r: unknown option; is --lora.rank meant?"),
        ("prune --trainer.dev 1", "--trainer.dev: unknown option; is --trainer.devices meant?"),
        ("prune --pruning.pool.al 1", "--pruning.pool.al: unknown option; is --pruning.pool.alpha meant?"),
        ("pack --model.rev main", "--model.rev: unknown option; is --model.revision meant?"),
        ("compare a b --out c", "--out: unknown option; is --output meant?"),
        ("prune --pruning.sparsity 50", "--pruning.sparsity 50: must lie {}; is 0.5 meant?"),
        ("prune --pruning.sparsity 62.5%", "--pruning.sparsity 62.5%: expected float{}; is 0.625 meant?"),
        ("prune --bs 2", "--bs: unknown option; is --data.batch_size meant?"),
        ("prune --trainer.strategy dpp", "--trainer.strategy dpp: {}; is ddp meant?"),
        ("prune --trainer.accelerator gpuu", "--trainer.accelerator gpuu: {}; is gpu meant?"),
        ("prune --trainer.precision bf61", "--trainer.precision bf61: expected one of 64, 32, 16, {}; is bf16 meant?"),
        ("evaluate --engine.benchmrk LocalBenchmark", "{}; is --engine.benchmark meant?"),
    ],
)
def test_what_is_misspelt_is_told_how_it_is_meant(arguments, meant, capsys):
    assert main(arguments.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    start, end = meant.split("{}") if "{}" in meant else (meant, "")
    assert line.startswith(f"error: {start}")
    assert line.endswith(end)


@pytest.mark.parametrize("given", ["own.py", "./own.py", "own", "Gained", "own:Gained"])
def test_a_file_and_a_bare_name_of_a_class_are_told_how_the_class_is_named(given, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(
        "class Other(Pool):\n    pass\n\n\nclass Gained(Solver):\n    a: int = {}  # no YAML: at all\n"
    )
    # A bare name is looked up among all classes that this process has ever met: this one is no other test's.
    assert main(["prune", f"--pruning.solver={given}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: --pruning.solver {given}: ")
    assert line.endswith("; is own.Gained meant?")
    assert main(["prune", f"--data.source={given}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: --data.source {given}: ")
    assert "Pool" not in line
    assert "Other" not in line


def test_options_of_classes_of_the_users_own_are_told_how_they_are_meant(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(tmp_path)
    text = "from lvlm_prune.methods import Scorer\n\n\nclass Curved(Scorer):\n"
    text += "    def __init__(self, curvature: float = 1.0):\n        self.curvature = curvature\n\n"
    text += "    def score(self, weight, statistic):\n        return weight.float()\n"
    (tmp_path / "curved_scorer.py").write_text(text)
    assert main(["prune", "--pruning.scorer=curved_scorer.Curved", "--pruning.scorer.curvatur=2"]) == 2
    said = "error: --pruning.scorer.curvatur: unknown option; is --pruning.scorer.curvature meant?\n"
    assert capsys.readouterr().err == said


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        (
            "--pruning.pool.saliency=pathlib.Paht",
            " pathlib.Paht: module 'pathlib' has no attribute 'Paht'; is pathlib.Path meant?",
        ),
        ("--pruning.pool.alfa=1", ": unknown option; is --pruning.pool.alpha meant?"),
    ],
)
def test_what_is_misspelt_inside_a_class_is_told_without_types_of_python(argument, said, capsys):
    assert main(["prune", argument]) == 2
    assert capsys.readouterr().err == f"error: {argument.split('=')[0]}{said}\n"


def test_an_option_of_a_class_that_is_not_chosen_names_the_classes_that_have_it(capsys):
    assert main(["prune", "--pruning.solver.keep_zeros=true"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --pruning.solver.keep_zeros: unknown option of the class in use; ALPSSolver, ")
    assert line.endswith("SparseGPTSolver take it")
    assert "Scorer" not in line
    assert main(["prune", "--pruning.pool.keep_zeros=true"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "error: --pruning.pool.keep_zeros: unknown option"


@pytest.mark.parametrize(
    "written", ["--engine.benchmark.source LlavaJsonSource", "--engine.benchmark.source=LlavaJsonSource"]
)
def test_what_a_class_wants_is_asked_for_by_its_option(written, capsys):
    assert main(["evaluate", "--engine.benchmark", "LocalBenchmark", *written.split()]) == 2
    assert capsys.readouterr().err == "error: --engine.benchmark.source.path: is wanted by LlavaJsonSource\n"


def test_what_was_left_out_of_a_configuration_is_asked_for(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text(
        "data:\n  source:\n    class_path: TextSource\n    init_args: {path: (left out)}\n"
    )
    command = ["prune", f"--config={tmp_path / 'config.yaml'}", f"--output={tmp_path / 'out'}"]
    assert main(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --data.source.path (left out): is no value but stands for a private one; give it")
    assert not (tmp_path / "out").exists()
    assert main([*command, f"--data.source.path={tmp_path / 'no.txt'}"]) == 2
    assert "no such file" in capsys.readouterr().err


WRITTEN = {
    "an unknown section": ("pruned: {sparsity: 0.5}\nresume: true", "--pruned.sparsity: unknown option"),
    "an unknown option": ("ressume: true\nevaluate: false", "--ressume: unknown option"),
    "its own name": ("config: bad.yaml", "--config bad.yaml: names itself"),
    "an escape that is no sign": ('output: "\\ud800"', "--config {}: is no YAML"),
    "a list for a class": ("pruning: {pool: [a]}", "--pruning.pool ['a']: expected the name of a class, a Pool"),
}


@pytest.mark.parametrize(("text", "said"), WRITTEN.values(), ids=WRITTEN.keys())
def test_a_mistake_in_a_configuration_names_option_or_file(text, said, tmp_path, capsys):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    assert main(["prune", f"--config={path}", f"--output={tmp_path / 'out'}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {said.format(path)}")


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("data: {source: {class_path: MixtureSource}}", "--data.source.sources: is wanted by MixtureSource"),
        (
            "pruning: {pool: {class_path: AsymmetricPool, init_args: {alpha: x}}}",
            "--pruning.pool.alpha x: expected float",
        ),
        (
            "pruning: {pool: {class_path: AsymmetricPool, init_args: {alpah: 1}}}",
            "--pruning.pool.alpah: unknown option; is --pruning.pool.alpha meant?",
        ),
        (
            "data: {source: {class_path: MixtureSource, init_args: {sources: [{class_path: NoSource}], ratios: [1]}}}",
            "--data.source.sources NoSource: no such class",
        ),
    ],
)
def test_an_option_in_a_file_is_named_with_its_place(written, said, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text(written)
    assert main(["prune", f"--config={tmp_path / 'run.yaml'}", f"--output={tmp_path / 'out'}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {said}")


@pytest.mark.parametrize("depth", [100, 500, 3000])
def test_a_value_that_is_nested_deeply_is_one_short_line(depth, capsys):
    assert main(["sweep", "--grid", '{"pruning.sparsity": ' + "[" * depth + "]" * depth + "}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --grid ")
    assert line.endswith(": is nested too deeply, or in itself")
    assert len(line) < 400


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("--pruning.scorer.help=-1", "--pruning.scorer.help -1: no such class (a short"),
        ("--pruning.scorer.help=Wnda", "--pruning.scorer.help Wnda: no such class; is WandaScorer meant?"),
        ("--pruning.scorer.help=", "--pruning.scorer.help : no such class"),
        ("--pruning.scorer.help=no.such.Class", "--pruning.scorer.help: No module named 'no'"),
        ("--data.source.help=json.JSONDecoder", '--data.source.help: "json.JSONDecoder" is not a subclass of'),
        ("--help=-1", "--help -1: --help takes no value"),
        ("--print_config=-1", "--print_config -1: takes no such value"),
    ],
)
def test_what_is_wrong_about_a_request_for_help_names_the_option(argument, said, capsys):
    assert main(["prune", argument]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {said}")


def test_without_a_command_there_is_help_and_a_failure(capsys):
    assert main([]) == 2
    said = capsys.readouterr()
    assert not said.out
    assert "usage: lvlm-prune COMMAND" in said.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["compare"], "compare: name two folders or more"),
        (["compare", "nowhere"], "compare nowhere: name two folders or more"),
        (["compare", "nowhere", ""], "compare '': is no name of a folder"),
        (["compare", "nowhere", "nothing"], "nowhere: no such folder"),
        (["pack", "nowhere"], "nowhere: has no option before it"),
        (["evaluate", "--engin", "x"], "--engin: unknown option; is --engine meant?"),
        (["sweep", "--resume", "true"], "--resume: is not needed by sweep: the same command goes on behind the last"),
        (["evaluate", "--resume", "true"], "--resume: unknown option"),
        (["sweep", "--recipes", "a.yaml", "b.yaml"], "b.yaml: has no option before it"),
    ],
)
def test_what_is_given_without_an_option_is_named_as_it_was_typed(arguments, said, capsys):
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {said}")


@pytest.mark.parametrize(
    ("content", "meant"),
    [
        ("pruning: {sparsty: 0.5}", "--pruning.sparsty: unknown option; is --pruning.sparsity meant?"),
        ("prunning: {sparsity: 0.5}", "--prunning.sparsity: unknown option; is --pruning.sparsity meant?"),
        (
            "pruning: {pool: {class_path: AsymmetricPool, init_args: {alhpa: 2}}}",
            "--pruning.pool.alhpa: unknown option; is --pruning.pool.alpha meant?",
        ),
    ],
)
def test_what_is_misspelt_in_a_file_is_told_as_on_the_command_line(content, meant, tmp_path, capsys):
    (tmp_path / "own.yaml").write_text(content)
    assert main(["prune", f"--config={tmp_path / 'own.yaml'}", f"--output={tmp_path / 'out'}"]) == 2
    assert capsys.readouterr().err == f"error: {meant}\n"


@pytest.mark.parametrize("arguments", [[], ["xyzzy"]])
def test_without_a_command_all_commands_are_named(arguments, capsys):
    """In one line where another one was given, in the help where none was."""
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert not arguments or len(said.splitlines()) == 1
    assert all(f" {command}" in said for command in (*VERBS, *ALONE))


@pytest.mark.parametrize(
    "arguments",
    [
        ["prune", "--{}=1"],
        ["prune", "--pruning.{}", "1"],
        ["prune", "--pruning.scorer", "{}"],
        ["prune", "--trainer.accelerator", "{}"],
        ["prune", "{}"],
        ["{}"],
        ["completion", "{}"],
        ["evaluate", "--engine", "{}"],
    ],
)
def test_no_error_goes_on_for_pages(arguments, capsys):
    assert main([argument.format("x" * 50_000) for argument in arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert len(line) < 2000
