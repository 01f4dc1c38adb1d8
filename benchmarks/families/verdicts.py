"""From the results of the checks: one line for each family, and the table of all."""

from __future__ import annotations

import re
from typing import Any

EXACT = "exact"
OWN_FORWARD_FAILS = "own forward fails"

# What stands before the reason where the command line or a runner refuses a model.
_REFUSED = re.compile(r"^.*?(InputError: |error: --model\.path \S+: )")

# Families whose images are no part of the decoder's sequence: some blocks attend to them.
_CROSS_ATTENTION = {"blip", "evolla", "idefics", "mllama"}


def verdict(name: str, found: dict[str, Any]) -> str:
    """`exact`, or in one line why not."""
    if "reason" in found:
        return found["reason"]
    visual = found.get("visual_tokens")
    wrong = []
    if isinstance(visual, str) or (visual == 0 and name not in _CROSS_ATTENTION):
        wrong.append(f"visual tokens: {visual or 'none are found'}")
    kinds = {**found["float32"], "blocks pruned on the way": found["pruned"]}
    kinds |= {f"bfloat16, {kind}": text for kind, text in found["bfloat16"].items() if text != OWN_FORWARD_FAILS}
    wrong += [f"{kind}: {text}" for kind, text in kinds.items() if text != EXACT]
    wrong += [problem for part in ("folder", "experts") if part in found and (problem := _folder(part, found[part]))]
    reasons = {_REFUSED.sub("", text) for text in wrong}
    if wrong and len(reasons) == 1 and all(_REFUSED.search(text) for text in wrong):
        return f"refused: {reasons.pop()}"
    return "; ".join(_REFUSED.sub("refused: ", text) for text in wrong) or EXACT


def _folder(part: str, folder: dict[str, Any] | str) -> str | None:
    if isinstance(folder, str):
        return f"{part}: {folder}"
    # Sums in another order decide a few ties otherwise; experts computed in groups round otherwise.
    ties = 1e-4 if part == "folder" else 1e-3
    if folder["different"] > max(4, ties * folder["weights"]):
        return f"{part}: {folder['different']} of {folder['weights']} weights differ"
    if not folder["same_linears"]:
        return f"{part}: other Linears than those that the model calls"
    return None if folder["reloads"] else f"{part}: keys are lost"


def table(results: dict[str, dict[str, Any]], version: str) -> str:
    """The results in Markdown."""
    verdicts = {name: verdict(name, found) for name, found in results.items()}
    in_mapping = [name for name in results if ":" not in name]
    decoders = [name for name in in_mapping if "blocks" in results[name]]
    exact = [name for name in decoders if verdicts[name] == EXACT]
    lines = [
        "# Families",
        "",
        f"Of the {len(in_mapping)} names of the image-text-to-text mapping of transformers {version}, {len(decoders)} "
        f"have a decoder of the kind that this package prunes; {len(exact)} of them are exact. Each is a tiny random "
        "model made from the default configuration, with every kind of block that this has. Exact means:",
        "",
        "- chained blocks equal the model's own forward bit by bit, in float32 and bfloat16, for single samples, "
        "batches padded on either side, and text; also when blocks are pruned on the way (float32);",
        "- a checkpoint folder pruned from the command line (Wanda, `MixedPool`, 50%, calibration from a safetensors "
        "file) has the masks that whole forwards of the model under plain hooks give (up to one weight in 10,000, "
        "for ties), and loads with no missing or unexpected key; where there are routed experts, once with "
        "`--pruning.experts keep`, once with `prune` (up to one weight in a thousand).",
        "",
        "Where the family takes images in no form that the script knows, only text was checked. A name with a colon is "
        "a variant of a family. Made by `python -m benchmarks.families.coverage`.",
        "",
        "| family | checked with | Linears | matrices of experts | result |",
        "|---|---|---|---|---|",
    ]
    for name, found in sorted(results.items()):
        folder, experts = found.get("folder"), found.get("experts")
        linears = folder["linears"] if isinstance(folder, dict) else ""
        matrices = experts["linears"] - linears if isinstance(folder, dict) and isinstance(experts, dict) else ""
        kinds = " and ".join(found.get("inputs", []))
        result = verdicts[name].replace("|", "/") + _not_in_half(found)
        lines.append(f"| `{name}` | {kinds} | {linears} | {matrices} | {result} |")
    return "\n".join([*lines, ""])


def _not_in_half(found: dict[str, Any]) -> str:
    failing = [kind for kind, text in found.get("bfloat16", {}).items() if text == OWN_FORWARD_FAILS]
    if not failing:
        return ""
    which = "" if len(failing) == len(found["bfloat16"]) else f" with {', '.join(failing)}"
    return f" (its own forward fails in bfloat16{which})"
