"""A comparison: what the folders were made with, how sparse they are and where, which weights both kept, the scores."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

from lvlm_prune.errors import InputError
from lvlm_prune.output.folder import named_folder, refuse_other_content, refuse_overlap, writing
from lvlm_prune.output.locking import shared
from lvlm_prune.output.manifest import replace_durably
from lvlm_prune.output.markdown import markdown_table, short_digest
from lvlm_prune.output.names import COMPARISON_RECORD, COMPARISON_TABLE, PRIVATE_SUFFIX
from lvlm_prune.output.questions import is_of_names
from lvlm_prune.output.summaries import DENSE_MODEL, compared_with, measure_text
from lvlm_prune.output.units import readable_percent
from lvlm_prune.report.block_names import kind_of_blocks
from lvlm_prune.report.uniform import EQUAL, has_flat_sparsities, is_uniform
from lvlm_prune.runs.compare.folders import ComparedFolder

# What the output folder may hold, and what that is.
_OWN = [COMPARISON_RECORD], "comparison"

_OTHER_MODELS = "the folders come from different models, so what differs is not the method alone"
_OTHER_QUESTIONS = "they were scored on different questions, so averages and retained shares do not compare the methods"
_UNKNOWN_QUESTIONS = (
    "one was scored by an older version, which noted names of pictures and not what is in them: whether the questions "
    "are the same is not known"
)


def compare(folders: Sequence[str], output: str = "") -> dict[str, Any]:
    """See `LVLMTrainer.compare`."""
    folders = _without_private_parts(folders)
    if len(folders) < 2:
        raise InputError("", " ".join(["compare", *folders]), "name two folders or more")
    if not all(map(str.strip, map(str, folders))):
        raise InputError("", "compare ''", "is no name of a folder")
    target = named_folder(output) if output else None
    if target is not None:
        refuse_other_content(target, *_OWN)
        for folder in folders:
            refuse_overlap(target, Path(folder))
    record = comparison([ComparedFolder(path) for path in folders])
    table = comparison_markdown(record)
    print(table, flush=True)
    if target is not None:
        from lvlm_prune.report.comparison import comparison_page
        from lvlm_prune.report.page import write_page

        with writing(target, "the tables are above"), shared(target, *_OWN):
            replace_durably(target / COMPARISON_RECORD, (json.dumps(record, indent=1) + "\n").encode())
            replace_durably(target / COMPARISON_TABLE, (table + "\n").encode())
            write_page(target, *comparison_page(record))
        print(f"wrote {target} (report.html · {COMPARISON_RECORD} · {COMPARISON_TABLE})", flush=True)
    return record


def _without_private_parts(folders: Sequence[str]) -> list[str]:
    """Folders without the private parts of others among them, which `runs/*` names too.

    Example:
        >>> _without_private_parts(["runs/a", "runs/a.private/", "runs/b.private"])
        ['runs/a', 'runs/b.private']
    """
    named = set(map(Path, folders))
    privates = {path for path in named if path.suffix == PRIVATE_SUFFIX and path.with_suffix("") in named}
    return [folder for folder in folders if Path(folder) not in privates]


def comparison(folders: Sequence[ComparedFolder]) -> dict[str, Any]:
    """All that is compared, as plain data.

    Returns:
        `warning`: what is wrong with comparing them, or empty; `folders`: per folder `name`, `path`, `command`,
        `sparsity`, `quality` (`perplexity`, `kl`, `agreement`, `measured_on`, `input`) or null, and of its scores
        `average`, `retention`, `tasks`, `questions` and `asked`, or null; `settings`: option -> its value in each
        folder, where they differ; `sparsity`: per folder, kind of Linear (and `all`) -> block -> share of zeros;
        `overlap`: per pair `first`, `second` (numbers of folders), `linears` that both have, `mean` over all their
        weights, and `kinds`: kind of Linear -> block -> intersection over union of the weights that both kept.
    """
    names = _names([folder.path for folder in folders])
    described = []
    for name, folder in zip(names, folders, strict=True):
        scores = folder.scores or dict.fromkeys(("average", "retention", "tasks", "questions", "asked"))
        described.append(
            {
                "name": name,
                "path": str(folder.path),
                "command": folder.verb,
                "sparsity": folder.mean_sparsity,
                "quality": folder.quality,
            }
            | scores
        )
    problems = [_OTHER_MODELS] if len({folder.origin for folder in folders} - {None}) > 1 else []
    asked = {what_was_asked(first, second) for first, second in combinations(described, 2)}
    problems += [_OTHER_QUESTIONS] if "other" in asked else [_UNKNOWN_QUESTIONS] if "unknown" in asked else []
    return {
        "warning": f"warning: {'; '.join(problems)}" if problems else "",
        "folders": described,
        "settings": different([folder.settings for folder in folders]),
        "sparsity": [_with_text_keys(folder.sparsity()) for folder in folders],
        "overlap": [
            {"first": first, "second": second} | overlap(folders[first], folders[second])
            for first, second in combinations(range(len(folders)), 2)
        ],
    }


def what_was_asked(first: Mapping[str, Any], second: Mapping[str, Any]) -> Literal["same", "other", "unknown"]:
    """Whether two folders were scored on the same questions, by their `scores`; `same` where one was not scored.

    Example:
        >>> one, other = {"questions": {"color": 8}}, {"questions": {"color": 40}}
        >>> what_was_asked(one, other), what_was_asked(one, {})
        ('other', 'same')
        >>> what_was_asked(one | {"asked": "9a0f"}, one | {"asked": "content:5c1b"})
        'unknown'
    """
    pairs = [(first.get(name), second.get(name)) for name in ("questions", "asked")]
    counts, asked = [None in pair or pair[0] == pair[1] for pair in pairs]
    if not counts:
        return "other"
    if not asked:
        return "unknown" if len({is_of_names(each) for each in pairs[1]}) > 1 else "other"
    return "same"


def different(settings: Sequence[Mapping[str, str]]) -> dict[str, list[str]]:
    """Options whose values differ, with the value in each folder, `–` where it has none.

    Options of a class, or of a command, that other folders do not have are left out where those that have them agree:
    that the class or the command is another one says it.

    Example:
        >>> different([{"pool": "A", "pool.alpha": "1", "seed": "0"}, {"pool": "B", "seed": "0"}])
        {'pool': ['A', 'B']}
        >>> different([{"command": "prune", "keep": "0"}, {"command": "recover", "lora.rank": "16"}])
        {'command': ['prune', 'recover']}
    """
    keys = list(dict.fromkeys(key for one in settings for key in one))
    values = {key: [one.get(key, "–") for one in settings] for key in keys}
    found = {key: of for key, of in values.items() if len(set(of)) > 1}

    def follows(key: str) -> bool:
        """Whether another entry says already that some folders do not have this one."""
        having = [one for one in settings if key in one]
        if len({one[key] for one in having}) > 1:
            return False
        commands = {one.get("command") for one in having} & {one.get("command") for one in settings if key not in one}
        return not commands or any(key.startswith(f"{other}.") for other in found)

    return {key: of for key, of in found.items() if not follows(key)}


def overlap(first: ComparedFolder, second: ComparedFolder) -> dict[str, Any]:
    """Intersection over union of the weights that both kept; one Linear of each in memory at a time."""
    both: dict[str, dict[int, int]] = {}
    either: dict[str, dict[int, int]] = {}
    compared = 0
    for name, entry in first.linears.items():
        if name not in second.linears or list(entry["shape"]) != list(second.linears[name]["shape"]):
            continue
        compared += 1
        ours, theirs = first.kept(name), second.kept(name)
        kind, block = first.place_of(name)
        for counts, found in ((both, ours & theirs), (either, ours | theirs)):
            of = counts.setdefault(kind, {})
            of[block] = of.get(block, 0) + int(found.sum())
    total = sum(count for of in either.values() for count in of.values())
    kinds = {
        kind: {block: both[kind][block] / max(count, 1) for block, count in of.items()} for kind, of in either.items()
    }
    return {
        "linears": compared,
        "mean": sum(count for of in both.values() for count in of.values()) / total if total else None,
        "kinds": _with_text_keys(kinds),
    }


def comparison_markdown(record: Mapping[str, Any]) -> str:
    """A comparison as tables in Markdown: folders, settings that differ, sparsity per block, overlap, scores."""
    folders = record["folders"]
    names = [folder["name"] for folder in folders]
    rows = [
        ["sparsity", *(_sparsity(folder["sparsity"]) for folder in folders)],
        ["average score", *(_percent(folder["average"]) for folder in folders)],
        ["retained", *(_percent(folder["retention"]) for folder in folders)],
    ]
    if any(folder["quality"] for folder in folders):
        origin = compared_with(folder["quality"] for folder in folders)
        for name, (title, written) in _QUALITY.items():
            if name == "input" and origin == DENSE_MODEL:
                continue
            cells = (written(folder["quality"][name]) if folder["quality"] else "–" for folder in folders)
            rows.append([title.format(origin), *cells])
    parts = [record["warning"]] if record["warning"] else []
    parts.append(markdown_table(["", *names], rows))
    settings = [[key, *map(short_digest, values)] for key, values in record["settings"].items()]
    parts.append(markdown_table(["setting", *names], settings) if settings else "All settings are the same.")
    blocks = sorted({int(block) for of in record["sparsity"] for block in of["all"]})
    rows = [[str(block), *(_sparsity(of["all"].get(str(block))) for of in record["sparsity"])] for block in blocks]
    if has_flat_sparsities(record):
        parts.append("Each folder is about as sparse in each of its blocks as on the whole.")
    else:
        parts.append(markdown_table([f"sparsity of {kind_of_blocks(record['sparsity'])}", *names], rows))
    for pair in record["overlap"]:
        title = f"{names[pair['first']]} and {names[pair['second']]}"
        if pair["mean"] is None:
            parts.append(f"Overlap of kept weights, {title}: no Linear of the same name and shape.")
            continue
        kinds = list(pair["kinds"])
        of_pair = sorted({int(block) for of in pair["kinds"].values() for block in of})
        rows = [[str(block), *(_share(pair["kinds"][kind].get(str(block))) for kind in kinds)] for block in of_pair]
        head = f"Overlap of kept weights (IoU), {title}: {pair['mean']:.3f} over {pair['linears']} Linears"
        if is_uniform(pair["kinds"], EQUAL):
            parts.append(f"{head}, about the same in each block and kind")
        else:
            parts.append(f"{head}\n\n{markdown_table(['block', *kinds], rows)}")
    tasks = list(dict.fromkeys(task for folder in folders for task in folder["tasks"] or {}))
    if tasks:
        rows = [[task, *(_score((folder["tasks"] or {}).get(task)) for folder in folders)] for task in tasks]
        parts.append(markdown_table(["score", *names], rows))
    return "\n\n".join(parts)


def _names(paths: Sequence[Path]) -> list[str]:
    """Names of folders: the last part, or all of the path where that is not enough to tell them apart."""
    short = [path.resolve().name for path in paths]
    return [name if short.count(name) == 1 else str(path) for name, path in zip(short, paths, strict=True)]


def _with_text_keys(values: Mapping[str, Mapping[int, float]]) -> dict[str, dict[str, float]]:
    """As JSON would have it, so that the record in memory is the record on disk."""
    return {kind: {str(block): value for block, value in of.items()} for kind, of in values.items()}


def _sparsity(value: float | None) -> str:
    return "–" if value is None else readable_percent(value)


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}%"


_QUALITY: dict[str, tuple[str, Callable[[Any], str]]] = {
    "perplexity": ("perplexity", measure_text),
    "kl": ("KL from the {}", measure_text),
    "agreement": ("most likely token of the {}", _percent),
    "input": ("input of pruning", str),
    "measured_on": ("measured on", str),
}


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _score(value: float | None) -> str:
    """A share in percent, another score as it is."""
    return "–" if value is None else f"{100 * value:.1f}%" if value <= 1 else f"{value:.1f}"
