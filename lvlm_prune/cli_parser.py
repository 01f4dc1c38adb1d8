"""LightningCLI with the verbs of this project as subcommands; its errors are one line."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NoReturn

from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from lvlm_prune.callbacks import BlockwisePruning, ModalityProbe, SparseLoRA
from lvlm_prune.cli_checks import OF_TRAINING, refuse_devices, refuse_null_options, refuse_unreadable, written_options
from lvlm_prune.cli_completion import WRITES_COMPLETION, add_recipes, parsers_of_alone
from lvlm_prune.cli_errors import ALONE, VERBS, OptionError, explain
from lvlm_prune.cli_help import TRAINER_HELP, asks_for_trainer, command_help, options_of_classes, options_of_lightning
from lvlm_prune.data import CalibrationDataModule, CalibrationSource, RecoveryDataModule
from lvlm_prune.distributed.hardware import names_of
from lvlm_prune.distributed.interruption import said_of_interruption
from lvlm_prune.distributed.ranks import is_first_process
from lvlm_prune.errors import InputError, LVLMPruneError, OtherProcessFailed, error_line, exit_status, meant, one_line
from lvlm_prune.evaluation.engine import Engine
from lvlm_prune.evaluation.harness import LMEvalEngine, LMMSEvalEngine
from lvlm_prune.evaluation.scores import Benchmark
from lvlm_prune.methods import Allocation, Pool, Saliency, Scorer, Solver
from lvlm_prune.module import LVLMModule
from lvlm_prune.option_files import refuse_times
from lvlm_prune.output.private import LEFT_OUT, left_out_options, with_whole_configs
from lvlm_prune.plugins import built_from, load_installed_plugins, refuse_values
from lvlm_prune.recipes import with_log_folder, with_recipe, without_log_folder
from lvlm_prune.trainer import LVLMTrainer

_DESCRIPTION = "Make a large vision-language model sparse after training, keep its quality, and see what it cost."
_QUIET = {"logger": False, "enable_model_summary": False}
_TRAINER_DEFAULTS: dict[str, dict[str, Any]] = {
    **{verb: _QUIET | {"enable_checkpointing": False} for verb in ("prune", "probe", "sweep", "reproduce", "evaluate")},
    "recover": _QUIET | {"max_epochs": 1, "gradient_clip_val": 1.0, "num_sanity_val_steps": 0},
}
# Verbs that read and write folders, with nothing to train or to calibrate.
_OF_FOLDERS = ("pack", "unpack")
_WITHOUT_TRAINER = ("compare", *_OF_FOLDERS)
# Options of `recover` that a method does not use.
_LEFT_OUT = {"lora": ["reconstruction"], "full": ["lora", "reconstruction"], "blockwise": ["distillation"]}
# Classes whose short names the command line is to know, beyond those that its signatures lead to.
_ENGINES = (LMEvalEngine, LMMSEvalEngine)
# Kinds of classes that can be an option's value, beside Lightning's.
_PLUGINS = (Allocation, Benchmark, CalibrationSource, Engine, Pool, Saliency, Scorer, Solver)


class LVLMParser(LightningArgumentParser):
    """A parser whose errors are one line."""

    command_line: ClassVar[Sequence[str]] = ()
    folder: ClassVar[Path] = Path()
    shown: ClassVar[Sequence[str]] = ()
    """What was typed, recipes and requests for help included."""
    commands: ClassVar[Mapping[str, LightningArgumentParser]] = {}
    """Those that know the options of a command; that of all commands has none, those of classes have their own."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        # `--lora.r 8`, PEFT's name, would be taken for `--lora.rank` now, and for another option in a later version.
        super().__init__(*arguments, **{"allow_abbrev": False, **options})

    def format_help(self, formatter: Any = None) -> str:
        """A sentence for each option, our own first."""
        verb = next(iter(self.command_line[:1]), "")
        return (
            command_help(self, verb, asks_for_trainer(self.shown)) if verb in VERBS else super().format_help(formatter)
        )

    def _print_message(self, message: str, file: Any = None) -> None:
        """Print, and do not keep to itself, as argparse does, that nothing can be written."""
        if message:
            (file or sys.stderr).write(message)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise instead of printing usage and a page of type subtleties."""
        # Also where a parser refuses something that has no options of the command itself.
        parser = self.commands.get(next(iter(self.command_line), ""), self)
        known = [*(option for option in parser._option_string_actions if option.startswith("--")), TRAINER_HELP]
        plugins = options_of_lightning(self.command_line) | options_of_classes(_PLUGINS)
        raise OptionError(explain(message, self.command_line, self.folder, known, plugins)) from None


class LVLMCLI(LightningCLI):
    """LightningCLI with the verbs of this project.

    Top-level keys of a configuration: `trainer`, `model` (LVLMModule), `data`, `output`, `resume`, `evaluate`; for
    `prune`, whose data is a CalibrationDataModule, `pruning` (BlockwisePruning); for `probe`, whose data is the same,
    `probing` (ModalityProbe); for `recover`, whose data is a RecoveryDataModule, `lora` (SparseLoRA), `method`,
    `optimization`, `dense`, `distillation` and `reconstruction`; for `sweep`, `recipes`, `grid`, `seeds` and `engine`;
    for `evaluate`, which has no `data`, `baseline` and `engine`; for `reproduce`, which has none either, `table`,
    `seeds`, `calibration`, `harness`, `engine` and `tasks`. `compare` has only `folders` and `output`; `pack` and
    `unpack` have a few options of `model`, `output` and `resume`, and `pack` has `format`.
    """

    _verb: str

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The verbs, and which of their arguments the CLI builds itself; of a command that begins with one, this one.

        Building the options of all takes longer than most commands need to find a mistake in theirs.
        """
        named = [verb for verb in LVLMParser.command_line[:1] if verb in VERBS]
        return {verb: {"model", "datamodule"} for verb in named or VERBS}

    def _add_subcommands(self, parser: LightningArgumentParser, **options: Any) -> None:
        """The verbs; a script that completes them also knows what is dealt with before there is a parser."""
        super()._add_subcommands(parser, **options)
        commands = parser._subcommands_action
        if WRITES_COMPLETION in os.environ and commands is not None:
            for name, alone in parsers_of_alone(type(parser)).items():
                commands.add_subcommand(name, alone, help=ALONE[name])
            add_recipes(self._subcommand_parsers)

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        self._verb = subcommand
        if subcommand == "compare":
            return self._compare_parser(**kwargs)
        if subcommand in _OF_FOLDERS:
            return self._packing_parser(subcommand, **kwargs)
        self.trainer_defaults = _TRAINER_DEFAULTS[subcommand]
        data = RecoveryDataModule if subcommand == "recover" else CalibrationDataModule
        self.datamodule_class = self._datamodule_class = data
        return super()._prepare_subcommand_parser(klass, subcommand, **kwargs)

    def _compare_parser(self, **options: Any) -> LightningArgumentParser:
        """Folders, which have no option before them, and no trainer, model or data."""
        parser = self.init_parser(**options)
        parser.add_argument("folders", nargs="+", type=str, help="Two or more output folders of prune and recover.")
        parser.add_argument("--output", type=str, default="", help="Folder for a page, the record and the table.")
        self._subcommand_method_arguments["compare"] = ["folders", "output"]
        return parser

    def _packing_parser(self, verb: str, **options: Any) -> LightningArgumentParser:
        """A checkpoint folder in, another one out; no trainer and no data."""
        parser = self.init_parser(**options)
        parser.add_argument("--model.path", type=str, default="demo", help="Checkpoint folder or hub id.")
        parser.add_argument("--model.revision", type=str, default="main", help="Branch, tag or commit of a hub id.")
        if verb == "pack":
            text = "Run modelling code that comes with the checkpoint."
            parser.add_argument("--model.trust_remote_code", type=bool, default=False, help=text)
        added = parser.add_method_arguments(LVLMTrainer, verb, skip={"model"})
        self._subcommand_method_arguments[verb] = added
        return parser

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """`trainer`, `model` and, but for `evaluate` and `reproduce`, `data`."""
        if self._verb not in ("evaluate", "reproduce"):
            super().add_core_arguments_to_parser(parser)
            return
        parser.add_lightning_class_args(self.trainer_class, "trainer")
        parser.set_defaults({f"trainer.{name}": value for name, value in self.trainer_defaults.items()})
        parser.add_lightning_class_args(self._model_class, "model")
        if self._verb == "reproduce":
            parser.set_defaults({"model.path": ""})

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The callback that does the work has a key of its own."""
        if self._verb == "prune":
            parser.add_lightning_class_args(BlockwisePruning, "pruning")
        elif self._verb == "probe":
            parser.add_lightning_class_args(ModalityProbe, "probing")
        elif self._verb == "recover":
            parser.add_lightning_class_args(SparseLoRA, "lora")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Let every parser know the options of the command, for what it says against one."""
        assert parser._subcommands_action is not None
        LVLMParser.commands = parser._subcommands_action.choices
        super().parse_arguments(parser, args)

    def before_instantiate_classes(self) -> None:
        """Refuse a plain value where options belong, immense numbers, and `null` where a plugin wants a value."""
        parser, given = self._parser(self.subcommand), self.config[self.subcommand]
        for key in parser.groups or ():
            if key not in given:
                continue
            value = "null" if given[key] is None else given[key]
            if isinstance(value, (str, int, float, list)):
                raise InputError(key, value, "expected options, for example `sparsity: 0.5` under `pruning`")
        refuse_null_options(parser, given)
        if given.get("output") == LEFT_OUT:  # of a finished run, which nobody writes into again
            given["output"] = ""
        refuse_values(options := given.as_dict())
        refuse_times(
            options, {name.removeprefix("--"): value for name, value in written_options(LVLMParser.command_line)}
        )
        for option in left_out_options(options):
            way_out = "give it, or take the configuration in the folder that ends with .private"
            raise InputError(option, LEFT_OUT, f"is no value but stands for a private one; {way_out}")

    def instantiate_classes(self) -> None:
        """Trainer, model and data, where the subcommand has any."""
        if self.subcommand in _WITHOUT_TRAINER:
            return
        try:
            with built_from(self.config[self.subcommand].as_dict()):
                super().instantiate_classes()
        except ValueError as error:  # of somebody else's class, which jsonargparse reports as its own
            given = str(error).rpartition("Given value: ")[2]
            values = self._get(self.config, "trainer").items()
            option = next((f"trainer.{name}" for name, value in values if str(value) == given), "")
            if not option:
                raise
            self._parser(self.subcommand).error(f'Parser key "{option}":\n{error}')

    def _dump_config(self) -> None:
        """Nothing: no module of this project saves its options as hyperparameters, for which Lightning writes all."""
        self.config_dump: dict[str, Any] = {}

    def _set_seed(self) -> None:
        if self.subcommand in _WITHOUT_TRAINER:
            return
        seed = self._get(self.config, "seed_everything")
        if not isinstance(seed, bool) and not 0 <= seed < 2**32:
            raise InputError("seed_everything", seed, "must lie between 0 and 4294967295")
        super()._set_seed()

    def _run_subcommand(self, subcommand: str) -> None:
        if subcommand not in _WITHOUT_TRAINER:
            super()._run_subcommand(subcommand)
            return
        options = self.config[subcommand].as_dict()
        options.pop("config", None)
        if subcommand in _OF_FOLDERS:
            options["model"] = LVLMModule(**options["model"])
        getattr(LVLMTrainer, subcommand)(**options)

    def instantiate_trainer(self, **kwargs: Any) -> LVLMTrainer:
        """The Trainer; what it says against its options becomes one line.

        Raises:
            InputError: Accelerator, devices or strategy cannot be had on this machine.
        """
        refuse_devices(self._get(self.config, "trainer.devices"))
        try:
            return super().instantiate_trainer(**kwargs)  # type: ignore[return-value]
        except Exception as error:  # of Lightning, about one of its many options, in as many ways
            if isinstance(error, LVLMPruneError):
                raise
            is_time = isinstance(error, OverflowError) and self._get(self.config, "trainer.max_time") is not None
            option = "max_time" if is_time else self._option_at_fault(str(error))
            # What SLURM lacks is said with the way out.
            problem = one_line(error) if isinstance(error, RuntimeError) else one_line(error).split(". ")[0]
            value = self._get(self.config, f"trainer.{option}")
            raise InputError(f"trainer.{option}", value, problem + meant(value, names_of(option))) from None

    def _option_at_fault(self, said: str) -> str:
        """The trainer's option that an error of Lightning speaks of; first of those that were given."""
        defaults = self._parser(self.subcommand).get_defaults()["trainer"].as_dict()
        given = self._get(self.config, "trainer").as_dict()
        named = [name for name in given if re.search(rf"(?<![a-z_]){name}(?![a-z_])", said.lower())]
        changed = [name for name in named if given[name] != defaults[name]]
        others = [name for name in given if given[name] != defaults[name]]
        return next(iter([*changed, *named, *others]), "devices")

    trainer: LVLMTrainer

    def before_prune(self) -> None:
        """Hand the process over to the trainer."""
        self._hand_over("prune")

    def before_probe(self) -> None:
        """Hand the process over to the trainer."""
        self._hand_over("probe")

    def before_sweep(self) -> None:
        """Hand the process over to the trainer."""
        self._hand_over("sweep")

    def before_reproduce(self) -> None:
        """Hand the process over to the trainer."""
        self._hand_over("reproduce")

    def before_evaluate(self) -> None:
        """Hand the process over, and refuse a precision that the engine does not hear of.

        Raises:
            InputError: `model.dtype` is not at its default.
        """
        config = self._hand_over("evaluate")
        if config["model"]["dtype"] != "auto":
            raise InputError("model.dtype", config["model"]["dtype"], "does nothing here; the engine has `dtype`")

    def before_recover(self) -> None:
        """Hand the process over, and refuse options of what the method leaves out.

        Raises:
            InputError: One of them is not at its default.
        """
        config = self._hand_over("recover")
        if config["method"] == "blockwise":
            self._refuse_training_options("recover", OF_TRAINING - {"gradient_clip_val"}, " --method blockwise")
        defaults = self._parser("recover").get_defaults()
        for section in _LEFT_OUT[config["method"]]:
            for name, value in config.pop(section).items():
                if value != defaults[section][name]:
                    raise InputError(f"{section}.{name}", value, f"does nothing with --method {config['method']}")

    def _hand_over(self, verb: str) -> dict[str, Any]:
        """The trainer gets the configuration that repeats the run, and may end the process, which is all its own."""
        self.trainer.owns_process = True
        self.trainer.config = config = self._run_config(verb)
        if verb != "recover":
            self._refuse_training_options(verb, OF_TRAINING, ", which trains nothing")
        return config

    def _refuse_training_options(self, verb: str, names: Collection[str], why: str) -> None:
        """Refuse options of the Trainer that only training heeds.

        Raises:
            InputError: One of them is not at its default.
        """
        parser = self._parser(verb)
        for name, value in self._get(self.config, "trainer").as_dict().items():
            if name in names and value != parser.get_default(f"trainer.{name}"):
                raise InputError(f"trainer.{name}", value, f"does nothing with {verb}{why}")

    def _run_config(self, verb: str) -> dict[str, Any]:
        parser, values = self._parser(verb), self.config[verb]
        config = json.loads(parser.dump(values, format="json", skip_none=True, skip_check=True))
        config.pop("config", None)
        return without_log_folder(config)


def run(arguments: Sequence[str]) -> int:
    """Run a command line, and print as one line what the user can mend.

    Args:
        arguments: What follows the program's name.

    Returns:
        Exit status, as of `lvlm_prune.cli.main`.
    """
    # Lightning sets its own levels when it is imported.
    for name in ("lightning", "lightning.pytorch", "lightning.fabric", "lightning_fabric", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        _use_working_directory()
        _run(arguments)
    except OtherProcessFailed as failure:
        return failure.status
    except LVLMPruneError as error:
        # Before they know of each other all processes fail alike, and one speaks.
        if error.agreed or is_first_process():
            print(error_line(error), file=sys.stderr)
        return 2
    except KeyboardInterrupt as interruption:
        if is_first_process():
            print(said_of_interruption(*interruption.args), file=sys.stderr)
        return exit_status(interruption)
    return 0


def _use_working_directory() -> None:
    """Find a user's own modules in the working directory; they never shadow installed ones.

    Raises:
        InputError: It is gone.
    """
    try:
        folder = os.getcwd()
    except OSError as error:
        problem = f"cannot be used ({error.strerror}); change into another one"
        raise InputError("", "the working directory", problem) from None
    if folder not in sys.path:
        sys.path.append(folder)


def _run(arguments: Sequence[str]) -> None:
    refuse_unreadable(arguments, Path.cwd())
    load_installed_plugins()
    arguments = with_whole_configs(arguments)
    if arguments[:1] in (["prune"], ["recover"]):
        arguments = with_recipe(arguments)
    arguments = with_log_folder(arguments)
    LVLMParser.shown = arguments
    arguments = ["--help" if argument == TRAINER_HELP else argument for argument in arguments]
    LVLMParser.command_line, LVLMParser.folder = arguments, Path.cwd()
    looks = any(name.startswith("LVLM_") for name in os.environ)  # to look for each option takes its time
    LVLMCLI(
        LVLMModule,
        CalibrationDataModule,
        trainer_class=LVLMTrainer,
        trainer_defaults=_TRAINER_DEFAULTS["prune"],
        save_config_callback=None,
        seed_everything_default=False,
        auto_configure_optimizers=False,
        parser_class=LVLMParser,
        parser_kwargs={"prog": "lvlm-prune", "default_env": looks, "env_prefix": "LVLM", "description": _DESCRIPTION},
        args=list(arguments),
    )
