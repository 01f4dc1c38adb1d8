"""What `lvlm-prune COMMAND --help` prints, found out by the parser and stored in the package.

python -m tests.help_texts            # stores it anew
python -m tests.help_texts --check    # names the commands of which something else is stored
"""

import argparse
import io
import sys
import warnings
from contextlib import redirect_stdout, suppress

from lvlm_prune.cli_errors import VERBS
from lvlm_prune.cli_help import STORED_HELP


def help_of(verb: str) -> str:
    """The help of a command, by its parser."""
    from lvlm_prune.cli_parser import run

    with redirect_stdout(io.StringIO()) as said, suppress(SystemExit), warnings.catch_warnings(action="ignore"):
        run([verb, "--help"])
    return said.getvalue()


def main() -> int:
    """Store the help of all commands, or compare it with what is stored.

    Returns:
        Exit status: 1 where something else is stored.
    """
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--check", action="store_true")
    given = parser.parse_args()
    texts = {STORED_HELP / f"{verb}.txt": help_of(verb) for verb in VERBS}
    if given.check:
        others = [path.stem for path, text in texts.items() if path.read_text(encoding="utf-8") != text]
        print(*others)
        return int(bool(others))
    STORED_HELP.mkdir(exist_ok=True)
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
