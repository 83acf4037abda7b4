"""`python -m support.zoo [WORDS ...]`: try every architecture with every method, print the matrix and what changed.

What was found goes into the package's file and into docs/models.md. With words only those architectures are tried whose
names have one of them; the lines of others, and of libraries that are not installed, stay as they are. It exits with 1
where something is open, where what worked does not any more, and where a method works that the list says cannot.
"""

import sys
from importlib.util import find_spec

from support.zoo import report
from support.zoo.everything import entries
from support.zoo.survey import surveyed
from tokenops import architectures
from tokenops.measuring.progress import Bar


def main(words: list[str]) -> int:
    before = architectures.supported() if architectures.FILE.exists() else []
    listed = entries()
    missing = {name for name in {entry.library for entry in listed} if find_spec(name) is None}
    chosen = [
        entry
        for entry in listed
        if entry.library not in missing and (not words or any(word in entry.architecture for word in words))
    ]
    tried = {entry[:2] for entry in chosen}
    after = [one for one in before if one[:2] in {entry[:2] for entry in listed} - tried]
    with Bar() as advance:
        for i, entry in enumerate(chosen):
            advance(f"{entry.library} {entry.architecture}"[:40].ljust(40), i / len(chosen))
            after.append(report.found(entry, *surveyed(entry)))
    lines, worse = report.changes(before, after)
    print(report.summary(after), *(f"not tried: {name} is not installed" for name in sorted(missing)), "", sep="\n")
    print(report.matrix([one for one in after if one[:2] in tried]))
    opened = [
        f"{one.library} {one.architecture}, {method}: {text}"
        for one in after
        for method, text in one.methods.items()
        if report.kind(text) == "open"
    ]
    for title, some in (("Open", opened), ("Changed", lines)):
        print(f"\n{title}: {len(some) or 'nothing'}", *some, sep="\n  ")
    report.written(after)
    return int(bool(opened) or worse or any(map(report.contradicts, after)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
