"""A parser's page about type subtleties, boiled down to one line that names the option and the value."""

import re
from collections.abc import Collection, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path

import yaml

from lvlm_prune.cli_checks import config_files, options_of_files, options_of_values, written_options
from lvlm_prune.cli_classes import close_classes, close_in_files, close_in_module
from lvlm_prune.errors import LONGEST_VALUE, LVLMPruneError, meant, shortened

VERBS = ("prune", "recover", "evaluate", "compare", "sweep", "reproduce", "probe", "pack", "unpack")
"""The subcommands."""

GO_ON = ("sweep", "reproduce")
"""Those that go on with what lies in their folder without being asked to."""

ALONE = {
    "methods": "List the recipes that `prune --method NAME` takes; `methods NAME` prints one.",
    "completion": "Print a script that completes commands and options: `completion bash`, `zsh`, `tcsh` or `fish`.",
    "kernels": "Say which kernels for packed weights this machine has.",
}
"""Commands that only print something."""

_SECTIONS = ("trainer", "model", "data", "pruning", "probing", "lora", "engine")
"""What the full name of an option inside a class may begin with."""

_STRAY = "has no option before it; options are --NAME VALUE, one value each ('[a, b]' for several, patterns in quotes)"


Plugins = Mapping[str, Collection[str]]


class OptionError(LVLMPruneError):
    """The command line or a configuration file cannot be understood."""


def explain(
    message: str,
    arguments: Sequence[str] = (),
    folder: Path = Path(),
    known: Collection[str] = (),
    plugins: Plugins | None = None,
) -> str:
    """One line out of jsonargparse's message.

    Args:
        message: What jsonargparse says.
        arguments: The command line; with its configuration files it gives options of plugins, which are reported
            without their place, their full name.
        folder: Where the command was given. jsonargparse reads a configuration file in the file's own folder.
        known: Options that there are, `--pruning.sparsity` and so on; what comes close to one is said to be meant so.
        plugins: Name of each class that can be an option's value -> its own options; likewise.

    Example:
        >>> explain('Parser key "prune.pruning.record":\\n  Expected a <class \\'bool\\'>. Got value: maybe')
        '--pruning.record maybe: expected bool'
        >>> explain("Option 'beta' is not accepted", ["prune", "--pruning.pool.beta", "3"])
        '--pruning.pool.beta: unknown option'
        >>> explain("unrecognized arguments: --sparsity 0.6", known=["--pruning.sparsity", "--pruning.pattern"])
        '--sparsity: unknown option; is --pruning.sparsity meant?'
        >>> explain("Option 'alhpa' is not accepted", ["--pruning.pool.alhpa", "2"], plugins={"MixedPool": ["alpha"]})
        '--pruning.pool.alhpa: unknown option; is --pruning.pool.alpha meant?'
    """
    plugins = plugins or {}
    arguments = [*arguments, *options_of_values(arguments), *options_of_files(arguments, folder)]
    text = re.sub(r"<class '([\w.]+)'>", r"\1", message).replace("typing.", "").replace("collections.abc.", "")
    text = re.sub(r"\s*\n\s*", " ", text).strip()
    if "subcommand" in text and not (arguments and arguments[0] in VERBS):
        if arguments and arguments[0] in ALONE:
            takes = "one name of a recipe, or nothing" if arguments[0] == "methods" else "nothing"
            return f"{' '.join(arguments)}: `{arguments[0]}` takes {takes}"
        commands = f"{', '.join([*VERBS, *ALONE][:-1])} or {[*ALONE][-1]}"
        if not arguments or arguments[0].startswith("-"):
            return f"a command is missing: {commands} (`lvlm-prune --help` has a sentence for each)"
        close = get_close_matches(arguments[0], (*VERBS, *ALONE), n=1)
        return f"{arguments[0]}: no such command, expected {commands}" + "".join(
            f"; is {verb} meant?" for verb in close
        )
    key, rest = _split_key(text)
    if broken := re.match(r"Problems parsing config: (.*)", rest):
        files = list(config_files(arguments))
        path = next((path for path in files if not _is_yaml(folder / path)), next(iter(files), ""))
        said = broken[1].replace(' in "<unicode string>"', "")
        return f"--config {path}: is no YAML: {said}"
    # What may be left out is reported as a choice between it and nothing, an option inside it as it was said already.
    if optional := re.search(r"Subtypes: \[[^\],]*, NoneType\] Errors: - (--.*?) - Expected an? NoneType", rest):
        return optional[1]
    # A plugin's option is reported inside a report about the plugin; both together are its place.
    while inner := re.match(r"Problem with given class_path '[^']*': ((?:Parser key|Option|Expected).*)", rest):
        inner_key, rest = _split_key(re.sub(r"^Option '([\w.]+)'", r'Parser key "\1": Option', inner[1]))
        key = f"{key}.{inner_key}" if inner_key else key
    option = _full_name(key, arguments)
    if not key and (of_help := re.match(r"(--[\w.]+\.help): (.*)", rest)):
        key = option = of_help[1]
        rest = of_help[2]
    if taken := re.match(r"argument (?:-\w/)?(--\w+): ignored explicit argument '(.*)'", rest):
        return f"{taken[1]} {taken[2]}: {taken[1]} takes no value"
    if taken := re.match(r"Invalid option \"(.*)\" for (--\w+)", rest):
        return f"{taken[2]} {taken[1]}: takes no such value"
    if (absent := re.match(r"File does not exist: '(.*)'", rest)) and option == "--config":
        path = Path(absent[1])
        is_recipe = path.parent.parent.name == "configs"
        way_out = f"; recipes that come with the package are taken by name: --method {path.stem}" if is_recipe else ""
        return f"--config {path}: no such file{way_out}"
    if loop := re.match(r"Config file loop detected: .* -> (.*)", rest):
        return f"--config {loop[1]}: names itself as a configuration of its own"
    if unknown := re.match(r"Subcommand '\w+' does not accept option '(.*)'", rest):
        return _unknown(f"--{unknown[1]}", known, plugins)
    if other := re.match(r"Not a valid subclass of (\w+)\. Got value: (.*?)(?: Subclass types expect.*)?$", rest):
        return f"{option} {_shown(other[2])}: expected the name of a class, a {other[1]}"
    if other := re.search(r"Import path (\S+) does not correspond to a subclass of (\w+)", rest):
        return f"{option} {other[1]}: is no {other[2]}"
    if value := re.search(r"Expected a dot import path string: ?(\S*)", rest):
        if value[1] in plugins:
            return f"{option} {value[1]}: is a class of another kind"
        kind = option.removesuffix(".help").rpartition(".")[2]
        close = close_in_files(value[1], kind, folder) or close_classes(value[1].rpartition(".")[2], kind, plugins)
        way_out = "(a short class name, or the import path of a class of the right kind)"
        return f"{option} {value[1]}: no such class{f'; is {close[0]} meant?' if close else f' {way_out}'}"
    if nested := re.search(r"NestedArg\(key='([\w.]+)'", rest):
        return _unknown(_full_name(f"{key.rpartition('.')[2]}.{nested[1]}", arguments, known), known, plugins)
    if missing := re.search(r"Problem with given class_path '([^']*)': (.*?)(?: - Expected an? NoneType\b.*)?$", rest):
        return f"{option} {missing[1]}: {missing[2]}{close_in_module(missing[2])}"
    if file := re.search(r"(?:Expected a path but|in sub-config file) ([^\s:]+)", rest):
        return f"{option} {file[1]}: is no class, and no YAML file that names one"
    if inner_problem := _inside_union(rest, option):
        return inner_problem
    if union := re.search(r"Subtypes: \[(.*?)\] Errors:.*Given value:(.*)", rest):
        kinds = [kind for kind in re.findall(r"Literal\[.*?\]|[^, ]+", union[1]) if kind != "NoneType"]
        return f"{option} {_shown(union[2])}: expected {_choices(' or '.join(kinds), union[2].strip())}"
    if plain := re.search(r"Expected an? (.*)\. Got value:(.*)", rest):
        return f"{option} {_shown(plain[2])}: expected {_choices(plain[1], plain[2].strip())}"
    if wanted := re.fullmatch(r"the following arguments are required: ([\w., ]+)", rest):
        if wanted[1] == "compare.folders":
            return "compare: name two folders or more"
        return _missing([f"{key}.{name}" if key else name for name in wanted[1].split(", ")], arguments, plugins)
    if file := re.match(r"Unable to load config ['\"]([^'\"]*)['\"]", rest):
        return f"{option} {file[1]}: no such YAML file (a single option of it is {option}.NAME)"
    if rest.startswith("Option is not accepted"):
        return _unknown(_full_name(key, arguments, known), known, plugins)
    if (stray := re.search(r"unrecognized arguments: (\S+)", rest)) and not stray[1].startswith("--"):
        return f"{stray[1]}: {_STRAY}"
    if unknown := re.search(r"[Oo]ption '([\w.]+)'|(?:unrecognized arguments|ambiguous option): (\S+)", rest):
        name = (unknown[1] or unknown[2]).split("=")[0].removeprefix("--")
        if name == "resume" and arguments and arguments[0] in GO_ON:
            return f"--resume: is not needed by {arguments[0]}: the same command goes on behind the last finished run"
        return _unknown(_full_name(name, arguments, known), known, plugins, arguments)
    if abstract := re.search(r"Expected an instantiatable class, but (?:[\w.]+\.)?(\w+) is abstract", rest):
        kind = option.rpartition(".")[2]
        choices = ", ".join(sorted(one for one in plugins if one.lower().endswith(kind) and "_" not in one))
        return f"{option}: is to be named first, a {abstract[1]}" + (f": {choices}" if choices else "")
    return f"{option}: {rest}" if key else rest


def _inside_union(text: str, option: str) -> str:
    """What is wrong inside a value that may be of several kinds; empty where it is of none of them.

    Example:
        >>> errors = "Errors: - --monitor: is missing - Not a valid subclass of Callback - Expected a NoneType"
        >>> given = "Given value type: list Given value: [Namespace(class_path='a.EarlyStopping', init_args=...)]"
        >>> _inside_union(f"Subtypes: [list, NoneType] {errors} {given}", "--trainer.callbacks")
        '--trainer.callbacks.monitor: is missing (EarlyStopping)'
    """
    found = re.search(r"Errors: - (.*) Given value type: .*? Given value:(.*)", text)
    if not found:
        return ""
    stock = r"Not a valid subclass|Expected an? |a class path|a dict |Does not validate"
    items = re.split(rf" - (?=--|{stock})", found[1])
    problem = next((item for item in items if not re.match(stock, item)), "")
    classes = dict.fromkeys(re.findall(r"class_path'?[=:] ?'(?:[\w.]+\.)?(\w+)'", found[2]))
    whose = f" ({next(iter(classes))})" if len(classes) == 1 else ""
    if inner := re.match(r"--([\w.]+)(.*)", problem):
        name = inner[1] if f"--{inner[1]}".startswith(f"{option}.") else f"{option[2:]}.{inner[1].rpartition('.')[2]}"
        return f"--{name}{inner[2]}{whose}"
    return f"{option}: {problem}{whose}" if problem else ""


def _unknown(option: str, known: Collection[str], plugins: Plugins, arguments: Sequence[str] = ()) -> str:
    """One line about an unknown option; of what stands inside the value of one that another class takes, about that.

    Example:
        >>> given = ["--engine.arguments", "{images: 1}"]
        >>> _unknown("--engine.arguments.images", [], {"LMEvalEngine": ["arguments"]}, given)
        '--engine.arguments: unknown option of the class in use; LMEvalEngine takes it'
    """
    for outer in (argument for argument in arguments if option.startswith(f"{argument}.")):
        if outer not in known and (way_out := hint(outer, known, plugins)):
            return f"{outer}: unknown option{way_out}"
    return f"{option}: unknown option{hint(option, known, plugins)}"


def hint(option: str, known: Collection[str], plugins: Plugins) -> str:
    """What an unknown option may be meant to be, to go on with a sentence; empty where nothing comes close.

    Args:
        option: `--pruning.sparsty`.
        known: Options that there are.
        plugins: Name of each class that can be an option's value -> its own options.

    Example:
        >>> hint("--pruning.sparsty", ["--pruning.sparsity", "--data.seed"], {})
        '; is --pruning.sparsity meant?'
        >>> hint("--prunning.sparsity", ["--pruning.sparsity", "--data.seed"], {})
        '; is --pruning.sparsity meant?'
        >>> hint("--lora.r", ["--lora.rank", "--lora.alpha"], {})
        '; is --lora.rank meant?'
        >>> hint("--pruning.solver.damping", [], {"ALPSSolver": ["damping"]})
        ' of the class in use; ALPSSolver takes it'
    """
    given, option = option, _with_close_section(option, known)
    if option in known and option != given:
        return f"; is {option} meant?"
    wanted = option.removeprefix("--")
    meant = [candidate for candidate in known if candidate.endswith(f".{wanted}") or _is_short_for(wanted, candidate)]
    if not meant:
        place, dot, name = option.rpartition(".") if "." in option else ("", "--", option.removeprefix("--"))
        beside = [candidate.removeprefix(place + dot) for candidate in known if candidate.startswith(place + dot)]
        # Inside a class: options of any class, since this one may be the wrong one.
        if place.count(".") or place == "--engine":
            if owners := _owners(place, name, plugins):
                take = "takes" if len(owners) == 1 else "take"
                listed = " and ".join(filter(None, [", ".join(owners[:-1]), owners[-1]]))
                return f" of the class in use; {listed} {take} it"
            beside += [name for names in plugins.values() for name in names]
        # One wrong letter is a larger part of a short name: `alfa`.
        cutoff = 0.65 if len(name) <= 5 else 0.75
        begun = [
            one for one in dict.fromkeys(beside) if name and one.startswith(name) and not one.endswith((".help", "+"))
        ]
        close = begun if 0 < len(begun) < 4 else get_close_matches(name, beside, n=1, cutoff=cutoff)
        close = [one for one in close if one != name]
        meant = [f"{place}{dot}{one}" for one in close]
    return f"; is {' or '.join(meant)} meant?" if meant else ""


def _is_short_for(name: str, option: str) -> bool:
    """Whether a name is an option's whose last part is written as the first letters of its words.

    Example:
        >>> _is_short_for("optimization.lr", "--optimization.learning_rate"), _is_short_for("bs", "--data.batch_size")
        (True, True)
    """
    section, _, last = option.removeprefix("--").rpartition(".")
    place, _, short = name.rpartition(".")
    return len(short) > 1 and short == "".join(word[:1] for word in last.split("_")) and place in ("", section)


def _with_close_section(option: str, known: Collection[str]) -> str:
    """An option whose first word is the closest one that there is: `--model.pth` for `--modle.pth`."""
    section, dot, rest = option.partition(".")
    sections = {candidate.partition(".")[0] for candidate in known if "." in candidate}
    if not dot or section in sections:
        return option
    return "".join([*get_close_matches(section, sections, n=1, cutoff=0.75), section][:1]) + dot + rest


def _missing(names: Sequence[str], arguments: Sequence[str], plugins: Plugins) -> str:
    """The first argument that a class wants, by the place of the class where it is named.

    Example:
        >>> _missing(["path"], ["prune", "--data.source", "TextSource"], {"TextSource": ["path"]})
        '--data.source.path: is wanted by TextSource'
    """
    named = list(written_options(arguments))
    given = [option for option, _ in named]
    for name in (name.rpartition(".")[2] for name in names):
        for option, value in named:
            takes_it = option.startswith("--") and name in plugins.get(value.rpartition(".")[2], ())
            if takes_it and f"{option}.{name}" not in given:
                return f"{option}.{name}: is wanted by {value}"
    return f"--{names[0]}: is missing"


def _owners(place: str, name: str, plugins: Plugins) -> list[str]:
    """The classes of the kind that an option takes which have an option of this name; classes end with their kind.

    Example:
        >>> _owners("--pruning.solver", "keep_zeros", {"ALPSSolver": ["keep_zeros"], "AScorer": ["keep_zeros"]})
        ['ALPSSolver']
    """
    kind = place.rpartition(".")[2].removeprefix("--").lower()
    return sorted(one for one, names in plugins.items() if name in names and one.lower().endswith(kind))


def _split_key(text: str) -> tuple[str, str]:
    found = re.match(rf'Parser key "(?:(?:{"|".join(VERBS)})\.)?([\w.]+)":\s*(.*)', text)
    return (found[1], found[2]) if found else ("", text)


def _full_name(key: str, arguments: Sequence[str], known: Collection[str] = ()) -> str:
    """`--pruning.pool.alpha` for `alpha` where the command line has it, else `--alpha`.

    Args:
        key: The end of a name, as it is reported.
        arguments: The command line.
        known: Options that there are, which an unknown one is none of.

    Example:
        >>> _full_name("path", ["--model.path", "a", "--data.source.path", "b"], ["--model.path"])
        '--data.source.path'
        >>> _full_name("alpha", ["--pruning.pool.alpha", "2"]), _full_name("beta", ["--pruning.pool.alpha", "2"])
        ('--pruning.pool.alpha', '--beta')
        >>> _full_name("model_args.images", ["--engine.model_args", "{images: 1}"])  # what stands inside its value
        '--engine.model_args.images'
        >>> _full_name("model_args", ["--engine.model_args.images=1"])  # as files are read
        '--engine.model_args'
    """
    names = [argument.split("=")[0] for argument in arguments if argument.startswith("--")]
    names = [name for name in names if name not in known] + [name for name in names if name in known]
    section, dot, _ = key.partition(".")
    is_whole = f"--{key}" in names or bool(dot and section in _SECTIONS)
    head, inside = "" if is_whole else key, ""
    while head:
        for name in names:
            before, found, _ = f"{name}.".partition(f".{head}.")
            if found:
                return f"{before}.{head}{inside}"
        head, _, last = head.rpartition(".")
        inside = f".{last}{inside}"
    return f"--{key}"


def _is_yaml(path: Path) -> bool:
    try:
        yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return False
    return True


def _shown(value: str) -> str:
    """A value as it was typed: YAML's word for None, and nothing as the quotes that a shell needs for it."""
    value = value.strip()
    return shortened({"": "''", "None": "null"}.get(value, value), LONGEST_VALUE)


def _choices(expected: str, given: str) -> str:
    """What may be given, and which of several names a misspelt one may be meant to be.

    Example:
        >>> _choices("Literal['bitmask','coded']", "coded2"), _choices("int", "one")
        ('one of bitmask, coded; is coded meant?', 'int')
        >>> _choices("float", "50%")
        'float; is 0.5 meant?'
        >>> _choices("Literal[64, 32] or Literal['64', 'bf16']", "bf61")
        'one of 64, 32, bf16; is bf16 meant?'
    """
    if "float" in expected and (percent := re.fullmatch(r"(\d+(?:\.\d+)?)%", given)):
        return f"{expected}; is {float(percent[1]) / 100:g} meant?"
    if not re.fullmatch(r"Literal\[.*?\](?: or Literal\[.*?\])*", expected):
        return expected
    names = list(dict.fromkeys(re.findall(r"[^\[\],' ]+", re.sub(r"Literal\[|\] or ", ",", expected))))
    return f"one of {', '.join(names)}{meant(given, names)}"
