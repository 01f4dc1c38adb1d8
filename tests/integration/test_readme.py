"""What the README shows is what happens."""

import json
import re
import shlex

from tests.conftest import GOLDEN_ARGUMENTS, REPOSITORY

README = (REPOSITORY / "README.md").read_text()
PAGES = {path: path.read_text() for path in (REPOSITORY / "README.md", *(REPOSITORY / "docs").glob("*.md"))}


def code_blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_example_of_a_criterion_of_ones_own_runs(run_cli, tmp_path):
    (example,) = [block for block in code_blocks("python") if block.startswith("# mine.py")]
    assert len(example.splitlines()) <= 15
    (tmp_path / "mine.py").write_text(example)
    (command,) = [block for block in code_blocks("bash") if "mine." in block]
    program, *arguments = shlex.split(command)
    assert program == "lvlm-prune"
    assert arguments[0] == GOLDEN_ARGUMENTS[0]
    finished = run_cli(*GOLDEN_ARGUMENTS, *arguments[1:], "--output=out")
    assert finished.returncode == 0, finished.stderr
    assert json.loads((tmp_path / "out" / "pruning.json").read_text())["status"] == "complete"


def test_every_recipe_is_in_the_table_of_methods():
    for recipe in (REPOSITORY / "configs" / "prune").glob("*.yaml"):
        assert f"`{recipe.stem}`" in PAGES[REPOSITORY / "docs" / "methods.md"], recipe.name


def test_every_file_that_is_named_exists():
    for page, text in PAGES.items():
        for name in re.findall(
            r"(?<![\w/])(?:configs|benchmarks|callbacks|lvlm_prune)/[\w/.-]+\.(?:yaml|py|md|json)", text
        ):
            assert (REPOSITORY / name).is_file(), (page.name, name)


def test_every_link_leads_somewhere():
    for page, text in PAGES.items():
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
            assert (page.parent / target).exists(), (page.name, target)


def test_the_commands_of_the_readme_run_in_the_container():
    """Pruning as its entry point, tests by the comment at its head; torch and a compiler are there for both."""
    container = (REPOSITORY / "Dockerfile").read_text()
    commands = [line.partition("&& ")[2] for block in code_blocks("bash") for line in block.splitlines()]
    pruning, tests = (next(line for line in commands if start in line) for start in ("lvlm-prune prune", "pytest"))
    assert f"lvlm-prune {pruning.removeprefix('lvlm-prune ')}\n" in container
    assert 'ENTRYPOINT ["lvlm-prune"]' in container
    assert f"--entrypoint python lvlm-prune {tests.removeprefix('python ')}\n" in container
    bounds = next(line for line in (REPOSITORY / "pyproject.toml").read_text().splitlines() if '"torch>=' in line)
    assert bounds.strip().rstrip(",") in container
    assert "g++" in container


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 200
