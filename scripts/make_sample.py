"""Build the text sample in `configs/sample/` from larger collections.

    python scripts/make_sample.py BOOKS.jsonl.zst --out configs/sample

Input rows are JSON objects with `text`, `source` and `license`, one document (a chapter, a speech, a play) per row.
Only rows whose licence is CC0 or public domain are used. Every source gives the same share of bytes. Within a source,
documents come in the order of the SHA-256 of their text, so the choice is scattered and repeatable: the same input
gives the same output. The first documents go to `heldout`, later ones to `train`; no document is in both. Long
documents are cut at the end of a paragraph. Rows of the sources take turns, so that the beginning of a file is mixed
as well.
"""

import argparse
import hashlib
import json
from pathlib import Path

import zstandard

FREE_LICENSES = {"CC0", "CC0-1.0", "public domain"}


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the CC0 and public-domain text sample.")
    parser.add_argument("collections", nargs="+", type=Path, help="files of rows {text, source, license}, .jsonl.zst")
    parser.add_argument("--out", type=Path, required=True, help="folder for train.jsonl.zst and heldout.jsonl.zst")
    parser.add_argument("--train-bytes", type=int, default=2_000_000, help="raw UTF-8 text in train")
    parser.add_argument("--heldout-bytes", type=int, default=150_000, help="raw UTF-8 text in heldout")
    parser.add_argument("--longest", type=int, default=24_000, help="bytes after which a document is cut")
    args = parser.parse_args()

    sources = read_sources(args.collections)
    if not sources:
        parser.error("no row has a CC0 or public-domain licence")
    heldout = {}
    train = {}
    for name, rows in sources.items():
        heldout[name] = take(rows, args.heldout_bytes // len(sources), args.longest)
        train[name] = take(rows, args.train_bytes // len(sources), args.longest)
    args.out.mkdir(parents=True, exist_ok=True)
    write(args.out / "train.jsonl.zst", take_turns(train))
    write(args.out / "heldout.jsonl.zst", take_turns(heldout))


def read_sources(paths: list[Path]) -> dict[str, list[dict]]:
    """Free rows grouped by source name; within a source ordered by the hash of the text, each text once."""
    sources: dict[str, dict[str, dict]] = {}
    for path in paths:
        with path.open("rb") as file:
            raw = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True).read()
        for line in raw.split(b"\n"):
            if not line.strip():
                continue
            row = json.loads(line)
            if set(row["license"].split(" / ")) <= FREE_LICENSES:
                digest = hashlib.sha256(row["text"].encode()).hexdigest()
                sources.setdefault(row["source"], {})[digest] = {k: row[k] for k in ("text", "source", "license")}
    return {name: [rows[digest] for digest in sorted(rows)] for name, rows in sorted(sources.items())}


def take(rows: list[dict], budget: int, longest: int) -> list[dict]:
    """Remove documents from the front of `rows` until their text fills `budget` bytes; the last one is cut to fit."""
    taken = []
    while rows and budget > 2000:  # a shorter rest is not worth a document
        row = rows.pop(0)
        text = cut(row["text"], min(budget, longest))
        budget -= len(text.encode())
        taken.append({**row, "text": text})
    return taken


def cut(text: str, longest: int) -> str:
    """At most `longest` bytes of `text`, ending with a paragraph, or else a line, or else a word."""
    raw = text.encode()
    if len(raw) <= longest:
        return text
    head = raw[:longest].decode(errors="ignore")
    for end in ("\n\n", "\n", " "):
        if (at := head.rfind(end)) > len(head) // 2:
            return head[:at]
    return head


def take_turns(sources: dict[str, list[dict]]) -> list[dict]:
    """First rows of all sources, then second rows, and so on."""
    longest = max(map(len, sources.values()))
    return [rows[i] for i in range(longest) for rows in sources.values() if i < len(rows)]


def write(path: Path, rows: list[dict]) -> None:
    """Write `rows` as JSON lines, zstd level 19, and print the sizes."""
    raw = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    packed = zstandard.ZstdCompressor(level=19).compress(raw)
    path.write_bytes(packed)
    text_bytes = sum(len(row["text"].encode()) for row in rows)
    print(f"{path.name}: {len(rows)} documents, {text_bytes} bytes of text, {len(packed)} bytes compressed")


if __name__ == "__main__":
    main()
