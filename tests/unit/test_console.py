"""How the program ends: at once when interrupted, quietly when nobody reads, in one line otherwise."""

import errno
import io
import subprocess
import sys
from pathlib import Path

import pytest

from lvlm_prune.cli import main
from lvlm_prune.cli_checks import refuse_devices, refuse_unreadable
from lvlm_prune.errors import InputError, one_line, shortened
from lvlm_prune.option_files import refuse_immense


def run(body: str, stdout=subprocess.PIPE) -> subprocess.CompletedProcess:
    """The program, with another `main`."""
    code = f"import atexit, sys\nfrom lvlm_prune import cli\ndef main():\n    {body}\ncli.main = main\ncli.console()"
    return subprocess.run([sys.executable, "-c", code], stdout=stdout, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(("status", "late"), [(130, ""), (143, ""), (0, "late\n"), (2, "late\n")])
def test_an_interrupted_program_does_not_wait_for_what_python_does_at_its_end(status: int, late: str):
    ended = run(f"atexit.register(print, 'late'); return {status}")
    assert (ended.returncode, ended.stdout, ended.stderr) == (status, late, "")


def test_an_interruption_while_libraries_are_imported_is_one_line():
    ended = run("raise KeyboardInterrupt")
    assert (ended.returncode, ended.stderr) == (130, "interrupted\n")


def test_a_reader_that_goes_away_is_no_error():
    code = (
        "from lvlm_prune import cli\ndef main():\n    print('x\\n' * 500_000); return 0\ncli.main = main\ncli.console()"
    )
    program = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert program.stdout.readline() == "x\n"
    program.stdout.close()
    assert program.stderr.read() == ""
    assert program.wait() == 141


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_behind_the_output_is_one_line():
    with open("/dev/full", "w") as full:
        ended = run("print('x'); return 0", stdout=full)
    assert ended.returncode == 2
    assert ended.stderr.splitlines() == ["error: standard output: No space left on device"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("status", ["0", "None"])
def test_what_ends_the_program_by_itself_is_held_to_that_too(status):
    with open("/dev/full", "w") as full:
        ended = run(f"print('x'); sys.exit({status})", stdout=full)
    assert ended.returncode == 2
    assert ended.stderr.splitlines() == ["error: standard output: No space left on device"]


@pytest.mark.parametrize("request_", ["--help-trainer", "--pruning.scorer.help=WandaScorer"])
def test_help_that_cannot_be_written_is_not_kept_quiet(request_, monkeypatch):
    """argparse drops such an error."""

    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sys, "stdout", Full())
    with pytest.raises(OSError, match="No space left"):
        main(["prune", request_])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_behind_the_errors_changes_no_exit_status():
    code = "import sys\nfrom lvlm_prune import cli\nsys.argv[1:] = ['nonesuch']\ncli.console()"
    with open("/dev/full", "w") as full:
        assert subprocess.run([sys.executable, "-c", code], stderr=full).returncode == 2


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize("status", [0, 2])
def test_a_stream_that_is_closed_is_no_traceback(closed: str, status: int):
    code = f"from lvlm_prune import cli\ndef main():\n    print('x'); return {status}\ncli.main = main\ncli.console()"
    ended = subprocess.run(["sh", "-c", f'exec "$0" -c "$1" {closed}', sys.executable, code], capture_output=True)
    assert (ended.returncode, ended.stderr) == (status, b"")
    assert ended.stdout == (b"" if " >&-" in f" {closed}" else b"x\n")


def test_names_that_are_no_text_are_printed():
    ended = run(r"print('wrote \udcff'); return 0")
    assert (ended.returncode, ended.stdout) == (0, "wrote \\udcff\n")


def test_an_error_is_one_line_whatever_is_in_it():
    assert one_line("a\nb\r\n\tc\u2028d \udcff") == r"a b c d \udcff"
    said = str(InputError("model.path", "x" * 10_000, "no\nsuch"))
    assert len(said) < 400
    assert len(shortened("y" * 10_000)) <= 80


@pytest.mark.parametrize("devices", ["auto", 1, 2, "2", -1, "-1", [0], [0, 1], "0,1", "1,", None])
def test_devices_of_every_kind_are_understood(devices):
    refuse_devices(devices)


@pytest.mark.parametrize(
    "devices", [0, -2, "0", "abc", "", 1.5, True, [], ["a"], [0, 0], [-1], 10**20, {}, 10**5, "100000"]
)
def test_devices_that_can_be_none_are_refused(devices):
    with pytest.raises(InputError, match=r"--trainer\.devices"):
        refuse_devices(devices)


DEEP = "a: " + "[" * 2000 + "]" * 2000
LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12))


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"\xff\xfe", "no text in UTF-8"),
        (b"a: &a [*a]", "nested too deeply, or in itself"),
        (b"a: &a {b: *a}", "nested too deeply, or in itself"),
        (DEEP.encode(), "nested too deeply"),
        (LAUGHS.encode(), "nested too deeply"),
        (b"", "holds no options"),
        (b"pruning:\n", "holds no options"),
        (b"- a", "holds no options"),
        (b"hello", "holds no options"),
        (b"pruning: {a: 5}\ndata: {seed: 1}\npruning: {b: 6}\n", "has `pruning` twice, the second time in line 3"),
        (b"pruning: {sparsity: 0.5, sparsity: 0.6}", "has `sparsity` twice"),
        (b"seed_everything: " + b"9" * 5000, "holds a value that cannot be read"),
        (b"output: 2020-99-99", "holds a value that cannot be read"),
        (b"5: 5", "the key 5 is no name of an option"),
        (b"pruning: {yes: 5}", "the key True is no name of an option of pruning"),
        (b"pruning: {pool: {class_path: 5}}", "--pruning.pool 5: is no name of a class"),
        (b"pruning: {pool: {class_path: A, init_args: [1]}}", r"--pruning.pool.init_args \[1\]: expected options of A"),
        (b"pruning: {pool: {class_path: A, alpha: 2}}", "--pruning.pool.alpha 2: stands beside class_path"),
    ],
)
def test_a_configuration_file_that_no_parser_should_be_given_is_refused(content: bytes, problem: str, tmp_path: Path):
    (tmp_path / "bad.yaml").write_bytes(content)
    with pytest.raises(InputError, match=problem):
        refuse_unreadable(["prune", "--config=bad.yaml"], tmp_path)


def test_an_option_that_overrides_one_of_an_anchor_stands_there_once(tmp_path: Path):
    (tmp_path / "good.yaml").write_text("p: {q: &b {<<: &a {x: 1}, x: 2}}\nc: {<<: *b, x: 3}\nd: *b\n")
    refuse_unreadable(["prune", "--config=good.yaml"], tmp_path)


@pytest.mark.parametrize("path", ["x" * 5000, "a\0b", "\ud800"], ids=["long", "zero byte", "no UTF-8"])
def test_a_name_that_no_file_has_is_a_missing_configuration(path: str, tmp_path: Path):
    with pytest.raises(InputError, match="no such YAML file"):
        refuse_unreadable(["prune", f"--config={path}"], tmp_path)


@pytest.mark.parametrize("option", ["output", "model.path", "data.image_folder", "folders", "trainer.scratch"])
def test_a_name_that_no_file_can_have_is_refused_for_every_option(option: str):
    section, _, name = option.rpartition(".")
    for value, problem in (("x" * 256, "longer than any"), ("x/" * 2100, "longer than any"), ("a\0b", "a zero byte")):
        options = {name: [value] if name == "folders" else value}
        with pytest.raises(InputError, match=problem) as caught:
            refuse_immense({section: options} if section else options)
        assert len(str(caught.value)) < 500
    refuse_immense({"engine": {"prompt": "x" * 300}, "output": "é" * 127})


def test_a_pipe_as_a_configuration_file_is_not_waited_for(tmp_path: Path):
    import os

    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(InputError, match="is no file"):
        refuse_unreadable(["prune", "--config", "pipe.yaml"], tmp_path)


def test_a_logger_without_its_library_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr("lightning.fabric.loggers.tensorboard._TENSORBOARD_AVAILABLE", False)
    monkeypatch.setattr("lightning.fabric.loggers.tensorboard._TENSORBOARDX_AVAILABLE", False)
    assert main(["prune", "--trainer.logger=TensorBoardLogger"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: --trainer.logger ")
    assert "tensorboard" in line
