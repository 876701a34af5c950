"""Every task of texts or images, request in and answer out, beside transformers' pipeline and its graph's floor.

``python -m benchmarks.tasks`` prints a table and writes JSON. The floor is what an able engineer reaches with ONNX
Runtime and ``tokenizers`` (or Pillow) alone on the same fp32 graph: batches sorted by length, threads and batch size
searched, no answers made of the outputs. All in one process, in turn; the ratios are what means something.

Ours is the model of ``mlflow.tdeploy.load_model``, whose answers have the pipeline's form. Through ``mlflow.pyfunc``
they are the tables that MLflow's users expect, and to make a table takes pandas some 0.3 ms. And each is timed as a
client finds it that asks again as soon as it is answered; one that asks after a rest waits longer, whoever answers:
code and weights have left the processor's caches by then. Both are printed too, for lone requests.
"""

from __future__ import annotations

import argparse
import io
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import numpy as np
from PIL import Image
from tokenizers import Tokenizer

from benchmarks import peers
from benchmarks.data import glosses, photographs
from benchmarks.floor import BATCH_SIZES, THREADS
from benchmarks.report import Figure, Results, finish, say, summarize
from benchmarks.task_cases import CASES, MAX_LENGTH, Case, write_model
from mlflow_tdeploy.core.measure import interleave, ratio
from mlflow_tdeploy.core.pipeline import Pipeline
from mlflow_tdeploy.store.bundle import Bundle

RESULTS = Path(__file__).parent / "results" / "tasks.json"
VARIANT = "ort-cpu-fp32"
FLOOR_GOAL, SHARE_GOAL, PIPELINE_GOAL = 1.2, 10.0, 1.0
COUNTS = (1, 32)
#: Tokens of the texts that the share of tokenization is measured at.
_LONG = 128
_PAUSE = 0.02
#: Requests right before each timed one.
_LEAD = 2
Ask = Callable[[], Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmarks; returns 0 whether or not goals are met: a missed one is in the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tasks", description=__doc__)
    parser.add_argument("--only", action="append", choices=[case.name for case in CASES], help="this task only")
    parser.add_argument("--quick", action="store_true", help="a smoke run: few rounds; writes no JSON")
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON file to write")
    options = parser.parse_args(arguments)
    results = Results()
    with tempfile.TemporaryDirectory(prefix="tdeploy-bench-") as folder, peers.quiet():
        for case in CASES:
            if not options.only or case.name in options.only:
                say(f"{case.name}: logging")
                results.add(case.name, *measure(case, Path(folder) / case.name.replace(" ", "-"), quick=options.quick))
    return finish(results, options.out, quick=options.quick)


def measure(case: Case, work: Path, *, quick: bool) -> tuple[list[Figure], dict[str, Any]]:
    """Log a model of the task and measure it.

    Args:
        case: The task.
        work: A new folder.
        quick: A smoke run.
    """
    import mlflow.pyfunc

    import mlflow_tdeploy

    work.mkdir(parents=True)
    source = write_model(case, work / "source")
    # what is measured is speed, of weights that are partly random: whatever closeness they have
    mlflow_tdeploy.save_model(
        str(source), work / "model", task=case.task, precisions=["fp32"], budget="worst_cosine >= 0",
        shapes=None if case.images else {"sequence": (5, 32, MAX_LENGTH)},
    )  # fmt: skip
    served = mlflow.pyfunc.load_model(str(work / "model"), model_config={"variant": VARIANT})
    theirs = case.theirs(source) if case.theirs else None
    figures: list[Figure] = []
    details: dict[str, Any] = {}
    for count in COUNTS:
        say(f"{case.name}: {count} at once")
        texts: list[Any] = glosses()[:count] if count > 1 else glosses()[40:41]
        given = photographs(count) if case.images else list(texts)
        more, details[f"{count} at once"] = _at_once(case, work / "model", served, theirs, given, quick=quick)
        figures += more
    if not case.images:
        say(f"{case.name}: tokenization")
        figures.append(_tokenization(case, work / "model", served.get_raw_model(), rounds=3 if quick else 15))
    return figures, details


def _at_once(
    case: Case,
    model: Path,
    served: Any,
    theirs: Callable[[list[Any]], Any] | None,
    texts: Sequence[str],
    *,
    quick: bool,
) -> tuple[list[Figure], dict[str, Any]]:
    items = case.items(texts)
    ours, params = served.get_raw_model(), dict(case.params)
    answer, seconds = _post(case, model, items)
    floors, chosen = _floors(case, model, items, rounds=1 if quick else 5)
    calls: dict[str, Ask] = {"ours": lambda: ours.predict(items, params), **floors, "graph and answers": answer}
    if theirs is not None:
        calls["theirs"] = lambda: theirs(items)
    calls["ours"](), calls["ours"]()  # the second session for lone requests is opened beside the first few
    rounds, limit = (3, 5) if quick else (30, 40)
    lead = _LEAD if len(texts) == 1 else 0
    samples = interleave(calls, rounds=rounds, warmup=8, seconds=limit, pause=_PAUSE, lead=lead)
    answered = seconds[-(lead + 1) * len(samples["ours"]) :][lead :: lead + 1]
    floor = min(floors, key=lambda one: float(np.median(samples[one])))
    share = float(np.median(answered)) / float(np.median(samples["ours"]))
    name = f"{case.name}, {len(texts)} at once"
    figures = [
        Figure(name, 1e3 * float(np.median(samples["ours"])), "ms"),
        Figure("  beside the floor of its graph", ratio(samples, "ours", floor), "x", FLOOR_GOAL),
        Figure("  answers made of outputs", 100 * share, "%", SHARE_GOAL),
    ]
    if theirs is not None:
        by = "CrossEncoder.rank" if case.task == "text-ranking" else "transformers' pipeline"
        by = "SentenceTransformer.encode" if case.task == "sentence-embedding" else by
        figures.insert(1, Figure(f"  beside {by}", ratio(samples, "ours", "theirs"), "x", PIPELINE_GOAL))
    details = {
        "samples": summarize(samples),
        "floor": floor,
        "batch_sizes": chosen,
        "answers_ms": summarize({"answers": answered}),
        "texts": len(texts),
    }
    if len(texts) == 1:
        asked = {"params": params} if params else {}
        calls = {"ours": calls["ours"], "pyfunc": lambda: served.predict(items, **asked), **floors}
        more = {"through mlflow.pyfunc": ("pyfunc", _LEAD), "after a rest": ("ours", 0)}
        for name, (of, lead) in more.items():
            samples = interleave(calls, rounds=rounds, seconds=limit, pause=_PAUSE, lead=lead)
            floor = min(floors, key=lambda one: float(np.median(samples[one])))
            figures.append(Figure(f"  {name}, beside the floor", ratio(samples, of, floor), "x"))
            details[name] = summarize(samples)
    return figures, details


def _post(case: Case, model: Path, items: list[Any]) -> tuple[Ask, list[float]]:
    """Return what runs the graph and then makes answers of its outputs, and the seconds that the second takes."""
    task, session = Bundle.open(model).task(), _session(model, threads=1)
    params = task.check_params(dict(case.params))
    encoded = task.encode(task.items(items), params)
    batches = Pipeline(task, lambda feeds: feeds).batches(encoded)
    names = [output.name for output in session.get_outputs()]
    feeds = [encoded.collate(batch) for batch in batches]
    seconds: list[float] = []

    def answer() -> None:
        outputs = [dict(zip(names, session.run(None, one), strict=True)) for one in feeds]
        begin = time.perf_counter()
        made(outputs)
        seconds.append(time.perf_counter() - begin)

    def made(outputs: Sequence[Any]) -> Any:
        rows: list[Any] = [None] * len(encoded.lengths)
        for batch, fed, got in zip(batches, feeds, outputs, strict=True):
            for index, row in zip(batch, task.decode(got, fed, len(batch), params), strict=True):
                rows[index] = row
        return task.finish(task.answers(rows, encoded, params), params)

    return answer, seconds


def _floors(case: Case, model: Path, items: list[Any], *, rounds: int) -> tuple[dict[str, Ask], dict[str, int]]:
    """Return bare sessions for a request, one for each number of threads, and the batch size that suits each.

    All of them are measured beside the others, and the fastest there counts: which one that is depends on who else has
    threads in the process.
    """
    rows = case.rows(items)
    candidates: dict[tuple[int, int], Ask] = {}
    for threads in THREADS:
        session = _session(model, threads)
        for size in BATCH_SIZES if len(rows) > 1 else (1,):
            bare = _bare_images if case.images else _bare
            candidates[threads, size] = bare(model, session, rows, size)
    named = {f"{threads}/{size}": call for (threads, size), call in candidates.items()}
    samples = interleave(named, rounds=rounds, warmup=1, pause=_PAUSE)
    found, sizes = dict[str, Ask](), dict[str, int]()
    for threads in THREADS:
        of_these = [one for one in candidates if one[0] == threads]
        best = min(of_these, key=lambda one: float(np.median(samples[f"{one[0]}/{one[1]}"])))
        name = f"floor, {threads} threads"
        found[name], sizes[name] = candidates[best], best[1]
    return found, sizes


def _bare(model: Path, session: Any, rows: Sequence[Any], size: int) -> Ask:
    tokenizer = Tokenizer.from_file(str(Bundle.open(model).root / "assets" / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(MAX_LENGTH)
    names = [one.name for one in session.get_inputs()]

    def run() -> None:
        encodings = tokenizer.encode_batch_fast(list(rows)) if len(rows) > 1 else [_alone(tokenizer, rows[0])]
        order = sorted(range(len(rows)), key=lambda index: len(encodings[index].ids))
        for begin in range(0, len(order), size):
            some = [encodings[index] for index in order[begin : begin + size]]
            width = max(len(one.ids) for one in some)
            feeds = {name: np.zeros((len(some), width), np.int64) for name in names}
            for index, one in enumerate(some):
                whole = {"input_ids": one.ids, "attention_mask": one.attention_mask, "token_type_ids": one.type_ids}
                for name in names:
                    feeds[name][index, : len(one.ids)] = whole[name]
            session.run(None, feeds)

    return run


def _bare_images(model: Path, session: Any, files: Sequence[bytes], size: int) -> Ask:
    del model
    height, width = session.get_inputs()[0].shape[2:]

    def ready(file: bytes) -> Any:
        image = Image.open(io.BytesIO(file)).convert("RGB").resize((width, height), Image.Resampling.BILINEAR)
        return (np.asarray(image).transpose(2, 0, 1).astype(np.float32) / 127.5) - 1.0

    def run() -> None:
        images = list(pool.map(ready, files)) if len(files) > 1 else [ready(files[0])]
        for begin in range(0, len(images), size):
            session.run(None, {"pixel_values": np.stack(images[begin : begin + size])})

    pool = ThreadPoolExecutor(max(THREADS))
    return run


def _alone(tokenizer: Tokenizer, row: Any) -> Any:
    return tokenizer.encode(row) if isinstance(row, str) else tokenizer.encode(*row)


def _tokenization(case: Case, model: Path, ours: Any, rounds: int) -> Figure:
    """Return tokenization's share of a request's time, of 32 texts of 128 tokens."""
    task = Bundle.open(model).task()
    words = " ".join(glosses()[:400]).split()
    texts = [" ".join(words[place * 20 : place * 20 + _LONG]) for place in range(COUNTS[-1])]
    texts = [task.tokenizer.decode(task.tokenizer.encode(text).ids[1 : _LONG - 1]) for text in texts]
    items, params = case.items(texts), task.check_params(dict(case.params))
    calls: dict[str, Ask] = {
        "ours": lambda: ours.predict(items, dict(case.params)),
        "tokens": lambda: task.encode(task.items(items), params),
    }
    samples = interleave(calls, rounds=rounds, warmup=2, seconds=30, pause=_PAUSE)
    return Figure(
        f"  tokenization, {len(texts)} texts of {_LONG} tokens", 100 * ratio(samples, "tokens", "ours"), "%", SHARE_GOAL
    )


def _session(model: Path, threads: int) -> Any:
    import onnxruntime as ort

    bundle = Bundle.open(model)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    return ort.InferenceSession(
        str(bundle.path(bundle.variants[VARIANT].entry)), options, providers=["CPUExecutionProvider"]
    )


if __name__ == "__main__":
    raise SystemExit(main())
