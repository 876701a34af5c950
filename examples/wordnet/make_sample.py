"""Makes the WordNet sample beside this file: a real text classification task small enough for a repository.

Each WordNet gloss (a definition, then quoted usage examples) belongs to one of 45 lexicographer files such as
noun.animal or verb.motion. The definition is the text, the file's name is the label.

    python examples/wordnet/make_sample.py /usr/share/wordnet

Nothing random is drawn: texts are put in the order of a seeded hash, so any Python on any machine makes the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
from collections import defaultdict
from pathlib import Path

HERE = Path(__file__).resolve().parent

# The number in the second column of a data file is an index into this list (WordNet's lexnames(5)).
# fmt: off
LEXICOGRAPHER_FILES = [
    "adj.all", "adj.pert", "adv.all", "noun.Tops", "noun.act", "noun.animal", "noun.artifact", "noun.attribute",
    "noun.body", "noun.cognition", "noun.communication", "noun.event", "noun.feeling", "noun.food", "noun.group",
    "noun.location", "noun.motive", "noun.object", "noun.person", "noun.phenomenon", "noun.plant", "noun.possession",
    "noun.process", "noun.quantity", "noun.relation", "noun.shape", "noun.state", "noun.substance", "noun.time",
    "verb.body", "verb.change", "verb.cognition", "verb.communication", "verb.competition", "verb.consumption",
    "verb.contact", "verb.creation", "verb.emotion", "verb.motion", "verb.perception", "verb.possession",
    "verb.social", "verb.stative", "verb.weather", "adj.ppl",
]
# fmt: on

# Word counts (fewest, most) of the check texts: a variant is compared on short and on long inputs alike.
LENGTHS = [(1, 3), (4, 6), (7, 10), (11, 15), (16, 25), (26, 80)]
# A word is at least one token, so these many words are sure to go past a limit of 256 and one of 512 tokens.
LONG_TEXTS = {300: 12, 530: 8}
CHECK_TEXTS = 384

README = """# WordNet sample

Definitions from WordNet 3.0, each labelled with the lexicographer file it comes from: a real classification task with
{classes} classes, {train} training and {test} held-out texts.

- `train.tsv`, `test.tsv`: UTF-8, a header line, then `label<TAB>text`.
- `LICENSE`: WordNet's licence, as it stands at the head of every WordNet data file. It covers these files.

## How it was made

`python examples/wordnet/make_sample.py /usr/share/wordnet --seed {seed}` with the data files of Debian's package
`wordnet-base` ({version}). The same input and seed give the same bytes.

1. The text is the gloss up to its first quoted usage example; a definition that still holds a double quote is left out.
2. A definition that occurs more than once (compared without case) stays only if all its labels agree, and then once:
   no text is in a file twice, and none is in both files.
3. Per class, texts are ordered by the SHA-256 of seed and text; the first {test_max} (at most a fifth of the class)
   are held out, the next {train_max} are for training. Rare classes have fewer.

## Counts

| label | in WordNet, distinct | train | test |
| --- | ---: | ---: | ---: |
{rows}
| all | {pool} | {train} | {test} |
"""


def definition(gloss: str) -> str | None:
    """The part of a gloss before its quoted usage examples, or None where the two can't be told apart."""
    text = gloss.partition('; "')[0].strip().rstrip(";").strip()
    return " ".join(text.split()) if text and '"' not in text else None


def read_definitions(folder: Path) -> dict[str, list[str]]:
    """Distinct definitions per label; those that two labels share are left out, for no answer would be right."""
    labels: dict[str, set[str]] = defaultdict(set)
    spelling: dict[str, str] = {}
    for part in ("adj", "adv", "noun", "verb"):
        for line in (folder / f"data.{part}").read_text(encoding="utf-8").splitlines():
            if line.startswith("  "):  # the licence at the head of each file
                continue
            fields, _, gloss = line.partition(" | ")
            text = definition(gloss)
            if text:
                labels[text.lower()].add(LEXICOGRAPHER_FILES[int(fields.split()[1])])
                spelling.setdefault(text.lower(), text)
    pool: dict[str, list[str]] = defaultdict(list)
    for key, names in labels.items():
        if len(names) == 1:
            pool[next(iter(names))].append(spelling[key])
    return dict(sorted(pool.items()))


def read_license(folder: Path) -> str:
    """WordNet's licence, without the line numbers that the data files carry it with."""
    head = [line for line in (folder / "data.noun").read_text(encoding="utf-8").splitlines() if line.startswith("  ")]
    return "\n".join(line.strip().partition(" ")[2].strip() for line in head).strip() + "\n"


def shuffled(texts: list[str], seed: str) -> list[str]:
    """The texts in an order that depends on the seed and the texts only."""
    return sorted(texts, key=lambda text: hashlib.sha256(f"{seed}\n{text}".encode()).digest())


def check_texts(pool: list[str], seed: str) -> list[str]:
    """Texts of every length, the long ones joined from several definitions; shortest first."""
    pool = shuffled(pool, seed)
    chosen: list[str] = []
    long_count = sum(LONG_TEXTS.values())
    for index, (low, high) in enumerate(LENGTHS):
        wanted = (CHECK_TEXTS - long_count - len(chosen)) // (len(LENGTHS) - index)
        chosen += [text for text in pool if low <= len(text.split()) <= high][:wanted]
    taken = set(chosen)
    rest = iter([text for text in pool if text not in taken])
    for words, count in LONG_TEXTS.items():
        for _ in range(count):
            joined = next(rest)
            while len(joined.split()) <= words:
                joined += "; " + next(rest)
            chosen.append(joined)
    return sorted(chosen, key=lambda text: (len(text), text))


def write_tsv(path: Path, rows: list[tuple[str, str]]) -> None:
    """Writes label and text per line, after a header line."""
    path.write_bytes("".join(f"{label}\t{text}\n" for label, text in [("label", "text"), *rows]).encode())


def main(argv: list[str] | None = None) -> None:
    """Makes data/ and, when asked, the default check texts of the package."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wordnet", type=Path, help="folder with data.noun, data.verb, data.adj, data.adv")
    parser.add_argument("--out", type=Path, default=HERE / "data")
    parser.add_argument("--glosses", type=Path, help="folder to write glosses.txt and LICENSE.wordnet to as well")
    parser.add_argument("--train-per-class", type=int, default=250)
    parser.add_argument("--test-per-class", type=int, default=25)
    parser.add_argument("--seed", default="7")
    parser.add_argument("--version", default="1:3.0-37", help="the source's version, for the README")
    args = parser.parse_args(argv)

    train: list[tuple[str, str]] = []
    test: list[tuple[str, str]] = []
    unused: list[str] = []
    rows = []
    pool = read_definitions(args.wordnet)
    for label, texts in pool.items():
        ordered = shuffled(texts, args.seed)
        held_out = min(args.test_per_class, len(ordered) // 5)
        end = held_out + args.train_per_class
        test += [(label, text) for text in ordered[:held_out]]
        train += [(label, text) for text in ordered[held_out:end]]
        unused += ordered[end:]
        rows.append(f"| {label} | {len(texts)} | {len(ordered[held_out:end])} | {held_out} |")

    args.out.mkdir(parents=True, exist_ok=True)
    write_tsv(args.out / "train.tsv", train)
    write_tsv(args.out / "test.tsv", test)
    (args.out / "LICENSE").write_bytes(read_license(args.wordnet).encode())
    readme = README.format(
        classes=len(pool),
        train=len(train),
        test=len(test),
        pool=sum(map(len, pool.values())),
        rows="\n".join(rows),
        seed=args.seed,
        version=args.version,
        train_max=args.train_per_class,
        test_max=args.test_per_class,
    )
    (args.out / "README.md").write_bytes(readme.encode())
    if args.glosses:
        args.glosses.mkdir(parents=True, exist_ok=True)
        (args.glosses / "glosses.txt").write_bytes(("\n".join(check_texts(unused, args.seed)) + "\n").encode())
        (args.glosses / "LICENSE.wordnet").write_bytes(read_license(args.wordnet).encode())
    print(f"{len(train)} training and {len(test)} held-out texts in {len(pool)} classes -> {args.out}")


if __name__ == "__main__":
    main()
