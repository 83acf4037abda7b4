"""Every operator beside its peers, at batches of 1, 32 and 256 (16 and 1 in a rehearsal): the main sizes first."""

import sys

from . import options, sessions


def main() -> int:
    device = options(__doc__).device
    only = ("-k", "single and not norm and not 768", "--compile", "none") if device == "cpu" else ()
    sessions.run("operators", sessions.command("operators", device, *only, *sessions.OPERATORS))
    return 0


if __name__ == "__main__":
    sys.exit(main())
