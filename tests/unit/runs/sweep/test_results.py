"""Lines of a sweep or a search that are read again: whole ones count, everything else is measured again."""

import json
import os

import pytest

from lvlm_prune.errors import InputError
from lvlm_prune.output.own_files import digest_of_json
from lvlm_prune.runs.sweep.results import Results, share

SCORES = {
    "average": 0.5,
    "groups": {"vision": 0.5},
    "tasks": {"color": 0.5},
    "counts": {"color": 4},
    "task_groups": {"color": "vision"},
}
LINES = {
    "dense": ("sweep", {"identity": "dense-1", "scores": SCORES}),
    "run": (
        "sweep",
        {
            "identity": "2",
            "scores": SCORES,
            "method": "ATV",
            "sparsity": {"target": 0.5, "achieved": 0.5},
            "seconds": 1.0,
            "cost": {"seconds": 1.0},
        },
    ),
    "try": (
        "search",
        {
            "identity": "3",
            "recipe": "best",
            "level": 3,
            "sparsity": 0.1,
            "agreement": 1.0,
            "kl": None,
            "seconds": 1.0,
        },
    ),
}


def read(folder, kind, *lines) -> dict:
    (folder / f"{kind}.jsonl").write_text("\n".join(lines) + "\n")
    return Results(folder, f"{kind}.jsonl", kind).read().records


def written(line: dict) -> str:
    """A line with the digest of what it says."""
    return json.dumps(line | {"digest": digest_of_json(line)})


@pytest.mark.parametrize(("kind", "line"), LINES.values(), ids=LINES)
def test_a_line_counts_where_all_of_it_is_there(kind, line, tmp_path):
    assert read(tmp_path, kind, written(line)) == {line["identity"]: line}
    assert not read(tmp_path, kind, json.dumps(line)), "nothing says that it is as it was written"
    for name in line:
        assert not read(tmp_path, kind, written({key: value for key, value in line.items() if key != name})), name
        assert not read(tmp_path, kind, written(line | {name: [None]})), name


@pytest.mark.parametrize("other", ["5", '"text"', "[]", "null", "[" * 100_000, '{"identity": [1]}', '{"a":' * 5000])
@pytest.mark.parametrize("kind", ["sweep", "search"])
def test_a_line_of_anything_else_is_left_out(kind, other, tmp_path):
    assert not read(tmp_path, kind, other)


def test_what_is_no_file_is_refused_instead_of_waited_for(tmp_path):
    os.mkfifo(tmp_path / "sweep.jsonl")
    with pytest.raises(InputError, match=r"sweep\.jsonl, which is no regular file"):
        Results(tmp_path).read()


@pytest.mark.parametrize("part", ["", "1", "0/2", "3/2", "1/0", "1/2/3", "²/3", "١/٢", "-1/2", "1/" + "9" * 5000])
def test_a_part_that_is_none_is_refused(part):
    with pytest.raises(InputError, match="must be of the form 1/2"):
        share([], part)
