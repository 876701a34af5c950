"""Where a context answers a question, as transformers' pipeline ``question-answering`` returned it up to version 4."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from tokenizers import Tokenizer

from mlflow_tdeploy.core.budget import SPREAD, Budget, Limit
from mlflow_tdeploy.core.columns import Column, is_unicode
from mlflow_tdeploy.core.compare import Comparison
from mlflow_tdeploy.core.errors import InvalidInputError, shown
from mlflow_tdeploy.core.quality import ANSWERED, answered
from mlflow_tdeploy.core.tasks import TASKS, AnswerForm, Field, Head, Param
from mlflow_tdeploy.core.tasks._answer_spans import END, START, SpanComparison, Spans, spans_of
from mlflow_tdeploy.core.tasks._text import TextConfig, TextEncoded, TextTask, own_tokens
from mlflow_tdeploy.core.tensors import Arrays

#: Most tokens of a row, and those that parts of a context share, where nobody says so: the pipeline's.
_ROW, _SHARED = 384, 128
#: Aligned to words, several spans may be the same answer: so many more are looked at.
_MORE = 10
#: Words of a text that a made-up question is about.
_ASKED = 3


@dataclass(frozen=True)
class QuestionConfig(TextConfig):
    """Settings of a model that finds answers.

    Attributes:
        cls_id: Token that stands for a question without an answer; -1 for none.
    """

    cls_id: int = -1


@TASKS.register("question-answering")
class QuestionAnswering(TextTask):
    """Returns ``{"score", "start", "end", "answer"}`` per question; lists of them where ``top_k`` is not 1.

    Some of that pipeline is not kept: answers that end before they begin, with a score of 0, where there are fewer than
    were asked for; one answer for a list of them where there is one only; an empty list where there is none. With a
    tokenizer that pads on the left (and has the context first) it looks for answers in the question, too, and takes the
    first token for no answer: here answers are in the context, and the token of classes stands for none.
    """

    name: ClassVar[str] = "question-answering"
    settings: ClassVar[type] = QuestionConfig
    head: ClassVar[Head | None] = Head(
        START,
        axes=("batch", "sequence"),
        more=(END,),
        wide=False,
        architecture="ForQuestionAnswering",
        auto_class="AutoModelForQuestionAnswering",
    )
    columns: ClassVar[tuple[Column, ...]] = (Column("question"), Column("context"))
    default_budget: ClassVar[Budget] = Budget((Limit("max_score_difference", "<=", 0.05), SPREAD))
    offsets: ClassVar[bool] = True
    quality: ClassVar[tuple[str, ...]] = ANSWERED
    encoding: ClassVar[tuple[str, ...]] = ("max_seq_len", "doc_stride")
    params: ClassVar[tuple[Param, ...]] = (
        Param("top_k", "integer", 1, "How many answers per question, best first."),
        Param("max_answer_len", "integer", 15, "Most tokens of an answer."),
        Param("handle_impossible_answer", "boolean", False, "Whether there may be no answer: '' with a score."),
        Param("align_to_words", "boolean", True, "Whether answers begin and end where words do."),
        Param("max_seq_len", "integer", 0, "Most tokens of question and context at once; 0 for 384 or the model's."),
        Param("doc_stride", "integer", -1, "Tokens that parts of a long context share; -1 for half of that or 128."),
    )

    def check_params(self, params: Mapping[str, Any] | None) -> dict[str, Any]:
        """Check the parameters, and find out how long rows are and how much of a context two of them share."""
        checked = super().check_params(params)
        for name in ("top_k", "max_answer_len"):
            if checked[name] < 1:
                raise InvalidInputError(f"{name} must be at least 1, got {checked[name]}.")
        asked, stride = checked["max_seq_len"], checked["doc_stride"]
        length = int(asked or min(self.longest, _ROW))
        least = self._special_count + 2  # a token of each
        if not least <= length <= self.longest:
            raise InvalidInputError(
                f"max_seq_len must be from {least} to {self.longest}, the model's longest row, or 0; got {asked}."
            )
        usual = min(length // 2, _SHARED, length - least)
        if stride < -1 or stride > length - least:
            raise InvalidInputError(
                f"doc_stride must be from 0 to {length - least} with rows of {length} tokens, or -1 for {usual}; got "
                f"{stride}."
            )
        return {**checked, "max_seq_len": length, "doc_stride": usual if stride < 0 else int(stride)}

    def item(self, index: int, row: Any) -> Any:
        """Return a question and its context."""
        item = super().item(index, row)
        for column, text in zip(self.columns, item, strict=True):
            if not text:
                raise InvalidInputError(f"The {column.name} of item {index} is empty. Leave the item out.")
        return item

    def sample(self, texts: Sequence[str], like: Any = None) -> tuple[Any, ...]:
        """Return questions about texts, each with its text."""
        return tuple((f"What is {' '.join(text.split()[:_ASKED])}?", text or "?") for text in texts)

    def encode(self, items: Sequence[Any], params: Mapping[str, Any] | None = None) -> TextEncoded:
        """Tokenize questions and contexts, long contexts in several rows.

        Raises:
            InvalidInputError: A question leaves no room for its context.
        """
        asked = self.check_params(self.usual) if params is None else params
        length, stride = asked["max_seq_len"], asked["doc_stride"]
        self._check_room(items, length - self._special_count, stride)
        pairs = [(context, question) if self._left else (question, context) for question, context in items]
        cut = "only_first" if self._left else "only_second"
        return self.in_parts(items, pairs, stride, longest=length, strategy=cut)

    def decode(self, outputs: Arrays, feeds: Arrays, count: int, params: Mapping[str, Any]) -> Sequence[Any]:
        """Return the logits (tokens,) of beginnings and ends, of each row's own tokens."""
        mask, starts, ends = own_tokens(feeds), outputs[START], outputs[END]
        if mask is None:
            return [(starts[row], ends[row]) for row in range(count)]
        return [(starts[row, mask[row]], ends[row, mask[row]]) for row in range(count)]

    def join(self, parts: Sequence[Any], encoded: Any, item: int, params: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return the answers to a question, best first."""
        keep, words = params["top_k"], params["align_to_words"]
        wanted = Spans(
            keep * 2 + _MORE if words else keep,
            params["max_answer_len"],
            words,
            int(not self._left),
            self.config.cls_id,
        )
        context, none = encoded.texts[item][1], 1.0
        found: dict[str, dict[str, Any]] = {}
        for row, (starts, ends) in zip(encoded.rows_of(item), parts, strict=True):
            part = encoded.encodings[row]
            spans, impossible = spans_of(part, self.own(starts, part), self.own(ends, part), wanted)
            none = min(none, impossible)
            for score, begin, end in spans:
                answer = {"score": 0.0, "start": begin, "end": end, "answer": context[begin:end]}
                found.setdefault(answer["answer"].lower(), answer)["score"] += score
        answers = list(found.values())
        if params["handle_impossible_answer"] or not answers:
            score = none if params["handle_impossible_answer"] else 0.0
            answers.append({"score": score, "start": 0, "end": 0, "answer": ""})
        return sorted(answers, key=lambda one: one["score"], reverse=True)[:keep]

    def finish(self, answers: list[Any], params: Mapping[str, Any]) -> list[Any]:
        """Return one answer per question, or one list of answers where several were asked for."""
        return [answer[0] for answer in answers] if params["top_k"] == 1 else answers

    def answer_form(self) -> AnswerForm:
        """Return an answer per question, with its score and its place in the context."""
        place = (Field("start", "long"), Field("end", "long"))
        return AnswerForm("records", fields=(Field("score", "double"), *place, Field("answer", "string")))

    def comparison(self) -> Comparison:
        """Compare where answers may begin and end."""
        return SpanComparison()

    def metric(self, answers: Any, labels: Sequence[Any]) -> dict[str, float]:
        """Return exact match and F1 of the best answers, as SQuAD has them, as shares of 1.

        Args:
            answers: An answer, or a list of them, best first, for each question.
            labels: The right one, a list of those that are right (an empty one where there is none), or SQuAD's
                ``{"text": […]}``.
        """
        best = [one[0] if isinstance(one, list) else one for one in answers]
        return answered([one["answer"] for one in best], [_accepted(label) for label in labels])

    def check_labels(self, labels: Sequence[Any], items: Sequence[Any] = ()) -> None:
        """Make sure that each label is an answer, or a list of answers."""
        for index, label in enumerate(labels):
            if not all(isinstance(one, str) for one in _accepted(label)):
                raise InvalidInputError(
                    f"The label {index} must be an answer, or a list of those that are right, got {shown(label)}."
                )

    @functools.cached_property
    def _special_count(self) -> int:
        return int(self.tokenizer.num_special_tokens_to_add(is_pair=True))

    def _check_room(self, items: Sequence[Any], room: int, stride: int) -> None:
        """Refuse a question that leaves too little of a row's room for a context that has to be cut."""
        for index, encoding in enumerate(self.tokenized(self._plain, [question for question, _ in items])):
            size, context = len(encoding.ids), items[index][1]
            if size + stride < room or not is_unicode(context) or size + len(self._plain.encode(context)) <= room:
                continue
            raise InvalidInputError(
                f"The question of item {index} has {size} tokens of {room} in a row, and its context does not fit into "
                f"the rest, nor into parts of it that share {stride} tokens: {shown(items[index][0])}. Shorten the "
                f"question, or lower doc_stride."
            )

    @functools.cached_property
    def _plain(self) -> Tokenizer:
        """The tokenizer of questions alone, as they are beside a context."""
        found = Tokenizer.from_str(self.tokenizer.to_str())
        found.no_truncation()
        found.post_processor = None
        return found


def _accepted(label: Any) -> list[Any]:
    """Return the answers that are right; '' stands for none."""
    found = label.get("text", label) if isinstance(label, Mapping) else label
    answers = [found] if isinstance(found, str) or not isinstance(found, Sequence) else list(found)
    years = (str(one) if isinstance(one, int) and not isinstance(one, bool) else one for one in answers)
    return list(years) or [""]  # a table's column of nothing but years is one of numbers
