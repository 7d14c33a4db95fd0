"""From documents to requests: the prompts of lm-evaluation-harness 0.4.13, byte for byte.

The reference is `api/task.py:ConfigurableTask` (fewshot_context, build_qa_turn, construct_requests). Where it would
ask nonsense (a choice that is not text, a right answer that is not among the choices), this raises TaskError.
"""

import ast
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from eval_platform.errors import TaskError
from eval_platform.identity import ordered_id
from eval_platform.tasks.asking import Fewshot
from eval_platform.tasks.chat import Chat, Turn, as_messages, as_text
from eval_platform.tasks.sections import did_you_mean
from eval_platform.tasks.shots import draw_shots
from eval_platform.tasks.task import Task
from eval_platform.tasks.templates import inside, render_template
from eval_platform.values import Document, Item, Request, make_request

Fields: TypeAlias = Mapping[str, Any]


def render(
    task: Task,
    documents: Sequence[Document] | None = None,
    *,
    limit: int | None = None,
    most_shots: int | None = None,
    chat: Chat | None = None,
) -> Iterator[Item]:
    """One Item a document, in the order of the task's documents; its requests have repeat 0.

    documents: only these of the task's own; each has the same prompt as when all are rendered. limit: only the first.
    most_shots: only so many of each document's shots, the first of them. chat: as a conversation, each prompt what the
    chat template makes of it; whole texts to be scored stay what they are.
    Raises TaskError naming task, key, document and remedy, and what the chat template raises.
    """
    last = len(task.documents) if limit is None else min(limit, len(task.documents))
    wanted = None if documents is None else {document.position for document in documents}
    if wanted is not None:
        last = min(last, max(wanted, default=-1) + 1)
    writer = _Writer(task, chat)
    asked = [document.fields for document in task.documents[:last]]
    drawn = draw_shots(
        writer.definition.fewshot_config.sampler,
        task.shots,
        asked,
        writer.definition.shots,
        exclude_asked=writer.definition.excludes_asked,
        match=writer.definition.shots_match,
    )
    for document in task.documents[:last]:
        try:
            shots = next(drawn)
            if wanted is None or document.position in wanted:
                yield writer.item(document, shots[:most_shots])
        except TaskError as error:
            raise inside(f"task {task.name}, document {document.position}: ", error) from error


def bare_items(task: Task, rows: Iterable[Fields]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(question, choices) of each of the rows by itself: without description, shots and the answer's beginning.

    Of a whole text the question is that text; where the choices are contexts, it is what follows each of them.
    """
    writer = _Writer(task)
    kind = task.definition.output_type
    for fields in rows:
        if kind == "loglikelihood_rolling":
            yield writer.reference(fields), ()
        elif writer.choices_are_contexts:
            yield writer.reference(fields), tuple(writer.choices(fields))
        elif kind == "multiple_choice":
            yield writer.question_text(fields), tuple(writer.choices(fields))
        elif kind == "loglikelihood":
            yield writer.question_text(fields), (writer.reference(fields),)
        else:
            yield writer.question_text(fields), ()


def shot_texts(task: Task, rows: Iterable[Fields]) -> Iterator[tuple[str, str]]:
    """(question, answer) of each of the rows as a shot."""
    writer = _Writer(task)
    return (writer.example_parts(fields) for fields in rows)


def prompts_id(items: Iterable[Item]) -> str:
    """The id of what was asked and what is right, in order (contract section 1)."""
    return ordered_id([[request.request_id for request in item.requests], item.target] for item in items)


class _Writer:
    """Writes the items of one task. What is the same for all documents is looked up once, here."""

    def __init__(self, task: Task, chat: Chat | None = None) -> None:
        self.definition = task.definition if chat is None else task.definition.in_chat
        self.chat = chat
        self.columns = task.fields
        self.examples: dict[int, tuple[Turn, ...]] = {}
        own = task.definition.chat
        self.system_prompt, self.shots_as_turns = (own.system_prompt, own.shots_as_turns) if own else (None, None)
        if chat is not None and chat.system_prompt is not None:
            self.system_prompt = chat.system_prompt
        if chat is not None and chat.shots_as_turns is not None:
            self.shots_as_turns = chat.shots_as_turns
        # lm-eval: a choice that begins the model's turn needs no delimiter; one that goes on with gen_prefix may.
        begun = self.definition.gen_prefix
        apart = chat is None or (begun and not begun[-1].isspace())
        self.delimiter = self.definition.target_delimiter if apart else ""
        # As in lm-eval, the first document decides: a question that is a number picks one of the choices, which are
        # then contexts, with one continuation for all (Winogrande's partial evaluation).
        self.choices_are_contexts = (
            self.definition.output_type == "multiple_choice"
            and bool(task.documents)
            and isinstance(self.question(task.documents[0].fields), int)
        )

    def item(self, document: Document, shots: Sequence[Fields]) -> Item:
        definition, fields = self.definition, document.fields
        kind = definition.output_type
        if kind == "loglikelihood_rolling":
            text = self.reference(fields)
            return Item(document, (make_request("rolling", text),), (), text, text)
        before = self.before(fields, shots)
        if self.choices_are_contexts:
            return self.choice_of_context(document, before, len(shots))
        prompt = self.written([*before, *self.asked(self.question_text(fields), fields)])
        if kind == "multiple_choice":
            choices = self.choices(fields)
            requests = [self.continuation(prompt, choice) for choice in choices]
            target = self.right_choices(self.target(fields), choices)
            if definition.doc_to_text_reversed is not None:
                return self.both_orders(document, prompt, before, requests, choices, target, len(shots))
            return self.choice_item(document, prompt, requests, choices, target, len(shots))
        if kind == "loglikelihood":
            reference = self.reference(fields)
            request = make_request("choice", prompt, reference)
            return Item(document, (request,), (reference,), reference, prompt, len(shots))
        request = make_request("generate", prompt, settings=definition.generation)
        return Item(document, (request,), (), self.references(fields), prompt, len(shots))

    def choice_of_context(self, document: Document, before: Sequence[Turn], shots_used: int) -> Item:
        choices = self.choices(document.fields)
        answer = self.reference(document.fields)
        contexts = [self.written([*before, *self.asked(choice, document.fields, between="")]) for choice in choices]
        requests = [self.continuation(context, answer) for context in contexts]
        target = self.right_choices(self.question(document.fields), choices)
        prompt = as_text(before) if self.chat is None else _common_start(contexts)
        return self.choice_item(document, prompt, requests, choices, target, shots_used)

    def both_orders(
        self,
        document: Document,
        prompt: str,
        before: Sequence[Turn],
        requests: list[Request],
        choices: list[str],
        target: int | tuple[int, ...],
        shots_used: int,
    ) -> Item:
        """The question in both orders of its n choices: choice k of the one is choice n - 1 - k of the other.

        The item has 2 n choices: those of the first order, then those of the second in the order of what they mean,
        so that k and n + k mean the same.
        """
        fields, n = document.fields, len(choices)
        question = self.text_of("doc_to_text_reversed", self.definition.doc_to_text_reversed or "", fields)
        other = self.written([*before, *self.asked(question, fields)])
        requests = requests + [self.continuation(other, choice) for choice in reversed(choices)]
        right = (target,) if isinstance(target, int) else target
        both = (*right, *(k + n for k in right))
        return Item(document, tuple(requests), (*choices, *reversed(choices)), both, prompt, shots_used)

    def choice_item(
        self,
        document: Document,
        prompt: str,
        requests: list[Request],
        choices: Sequence[str],
        target: int | tuple[int, ...],
        shots_used: int,
    ) -> Item:
        if self.definition.wants_unconditional:
            requests = requests + [self.continuation("", choice) for choice in choices]
        return Item(document, tuple(requests), tuple(choices), target, prompt, shots_used)

    def continuation(self, context: str, choice: str) -> Request:
        return make_request("choice", context, f"{self.delimiter}{choice}")

    def written(self, turns: Sequence[Turn]) -> str:
        """The prompt that the turns make: one text, or what the chat template makes of them."""
        if self.chat is None:
            return as_text(turns)
        return self.chat.template(
            as_messages(turns, shots_as_turns=self.shots_as_turns is not False),
            continued=turns[-1].role == "assistant",
            needs_system=bool(self.system_prompt),
        )

    def before(self, fields: Fields, shots: Sequence[Fields]) -> list[Turn]:
        """What comes before the question: description, after the system prompt of a chat, and the shots."""
        description = self.definition.description
        system = self.text_of("description", description, fields) if description else ""
        if self.chat is not None and self.system_prompt:
            system = _joined(self.system_prompt, system, self.definition.fewshot_delimiter)
        before = [Turn("system", system)] if system else []
        for shot in shots:
            before += self.example_once(shot)
        return before

    def asked(self, question: str, fields: Fields, between: str | None = None) -> list[Turn]:
        """The question without its answer, and the beginning of the answer that is given to the model.

        between: what stands between the two where neither has white space; by default the delimiter.
        """
        prefix = self.prefix(self.definition.gen_prefix, fields)
        if not prefix:
            return [Turn("user", question)]
        between = self.definition.target_delimiter if between is None else between
        return [Turn("user", question, between if _apart(question, prefix) else ""), Turn("assistant", prefix)]

    def example_once(self, fields: Fields) -> tuple[Turn, ...]:
        """`example`, written once for each document of the pool (which lives as long as its task)."""
        known = self.examples.get(id(fields))
        if known is None:
            known = self.examples[id(fields)] = self.example(fields)
        return known

    def example_parts(self, fields: Fields) -> tuple[str, str]:
        """Question and answer of one shot."""
        definition, own = self.definition, self.definition.fewshot_config
        choices = None
        if definition.doc_to_choice is not None or own.doc_to_choice is not None:
            choices = self.choices(fields, own)
        if self.choices_are_contexts:
            index = self.question(fields, own)
            question = _at(choices or (), index, "doc_to_text")
            choices = None
        else:
            question = self.question_text(fields, own)
        return question, self.shot_answer(fields, choices)

    def example(self, fields: Fields) -> tuple[Turn, ...]:
        """One shot: the question and its answer, each with its delimiter."""
        definition, own = self.definition, self.definition.fewshot_config
        question, answer = self.example_parts(fields)
        prefix = self.prefix(own.gen_prefix if own.gen_prefix is not None else definition.gen_prefix, fields)
        between = definition.target_delimiter if own.target_delimiter is None else own.target_delimiter
        after = definition.fewshot_delimiter if own.fewshot_delimiter is None else own.fewshot_delimiter
        if prefix and not _apart(question, prefix):
            between = ""
        if answer:
            return Turn("user", question, between), Turn("assistant", _joined(prefix, answer, " "), after)
        return (Turn("user", question, between), Turn("assistant", prefix)) if prefix else (Turn("user", question),)

    def shot_answer(self, fields: Fields, choices: Sequence[str] | None) -> str:
        answer = self.target(fields, self.definition.fewshot_config)
        if isinstance(answer, list) and answer:
            answer = answer[0]
        if choices and isinstance(answer, int):
            return _at(choices, answer, "doc_to_target")
        if answer is None:
            return ""
        if not isinstance(answer, str):
            raise TaskError(
                f"doc_to_target of a shot is {answer!r}, which is not a text",
                remedy="make it a template, as in '{{answer}}', or name the choices in doc_to_choice",
            )
        return answer

    def question(self, fields: Fields, own: Fewshot | None = None) -> str | int:
        """doc_to_text: the question, or the index of a choice."""
        template = self.key("doc_to_text", own)
        if isinstance(template, int):
            return template
        if template in self.columns:
            value = self.column("doc_to_text", template, fields)
            if not isinstance(value, str | int) or isinstance(value, bool):
                raise TaskError(
                    f"doc_to_text: field {template!r} is {value!r}, which is not a text", remedy="name another field"
                )
            return value
        text = self.text_of("doc_to_text", template, fields)
        return int(text) if text.isascii() and text.isdigit() and self.definition.doc_to_choice is not None else text

    def question_text(self, fields: Fields, own: Fewshot | None = None) -> str:
        question = self.question(fields, own)
        template = self.key("doc_to_text", own)
        if isinstance(question, int) and isinstance(template, str) and template not in self.columns:
            return self.text_of("doc_to_text", template, fields)  # a question that happens to be digits
        if isinstance(question, int):
            raise TaskError(
                f"doc_to_text gives the number {question}, which is not a text",
                remedy="make it a template: '{{field}}'",
            )
        return question

    def choices(self, fields: Fields, own: Fewshot | None = None) -> list[str]:
        template = self.key("doc_to_choice", own)
        value: Any
        if isinstance(template, dict | list):
            value = list(template.values()) if isinstance(template, dict) else template
        elif template in self.columns:
            value = self.column("doc_to_choice", template, fields)
        else:
            text = self.text_of("doc_to_choice", template, fields)
            try:
                value = ast.literal_eval(text)
            except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
                raise TaskError(
                    f"doc_to_choice gives {text[:200]!r}, which is not a list of texts",
                    remedy="write the template so that it gives a list: '{{[field_a, field_b]}}'",
                ) from error
        if not isinstance(value, list) or not value or not all(isinstance(choice, str) and choice for choice in value):
            raise TaskError(
                f"doc_to_choice gives {value!r}; choices are a list of texts, none empty",
                remedy="name a field that holds such a list, or write a template that gives one",
            )
        return value

    def target(self, fields: Fields, own: Fewshot | None = None) -> Any:
        """doc_to_target as lm-eval takes it: a number, a text or a list."""
        template = self.key("doc_to_target", own)
        if not isinstance(template, str):
            return template
        if template in self.columns:
            return self.column("doc_to_target", template, fields)
        text = self.text_of("doc_to_target", template, fields)
        if text.isascii() and text.isdigit() and self.definition.doc_to_choice is not None:
            return int(text)
        if len(text) >= 2 and text[0] == "[" and text[-1] == "]":
            try:
                return ast.literal_eval(text) or text  # an empty list is no list of answers
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                return text  # an answer in brackets that is no list
        return text

    def reference(self, fields: Fields) -> str:
        """The one right text, which is what the model is asked to say: never empty."""
        target = self.target(fields)
        if not isinstance(target, str) or not target:
            raise TaskError(
                f"doc_to_target gives {target!r}, which is not a text", remedy="make it a template: '{{field}}'"
            )
        return target

    def references(self, fields: Fields) -> str | tuple[str, ...]:
        """The right text, or all texts that are right."""
        if self.definition.doc_to_target is None:  # answers that nothing is compared with
            return ""
        target = self.target(fields)
        if self.definition.doc_to_choice is not None and isinstance(target, int):
            return _at(self.choices(fields), target, "doc_to_target")
        if isinstance(target, list):
            if not target:
                raise TaskError("doc_to_target gives an empty list", remedy="give every document an answer")
            return tuple(str(value) for value in target)
        if target is None:
            raise TaskError("doc_to_target gives null", remedy="give every document an answer")
        return str(target)

    def right_choices(self, target: Any, choices: Sequence[str]) -> int | tuple[int, ...]:
        """The index of the right choice, or the indices of all."""
        if isinstance(target, list):
            if not target:
                raise TaskError("doc_to_target gives an empty list", remedy="give every document an answer")
            return tuple(self.right_choice(value, choices) for value in target)
        return self.right_choice(target, choices)

    def right_choice(self, target: Any, choices: Sequence[str]) -> int:
        if isinstance(target, int):
            _at(choices, target, "doc_to_target")
            return int(target)
        if isinstance(target, str) and target in choices:
            return list(choices).index(target)
        raise TaskError(
            f"doc_to_target gives {target!r}, which is neither a choice nor the number of one; the choices are "
            f"{list(choices)}",
            remedy="give the choice's text or its number, counted from 0 (digits in a text field: '{{field}}')",
        )

    def prefix(self, template: str | None, fields: Fields) -> str:
        return self.text_of("gen_prefix", template, fields) if template else ""

    def key(self, name: str, own: Fewshot | None) -> Any:
        """A key's value: the few-shot configuration's own, else the task's."""
        value = getattr(own, name) if own is not None else None
        return getattr(self.definition, name) if value is None else value

    def text_of(self, key: str, template: str, fields: Fields) -> str:
        """A field's text or a filled-in template."""
        if template in fields:
            value = fields[template]
            if not isinstance(value, str):
                raise TaskError(f"{key}: field {template!r} is {value!r}, which is not a text", remedy="use a template")
            return value
        try:
            return render_template(template, fields)
        except TaskError as error:
            raise inside(f"{key}: the template {_short(template)} ", error) from error

    def column(self, key: str, name: str, fields: Fields) -> Any:
        if name not in fields:
            raise TaskError(
                f"{key}: the document has no field {name!r}{did_you_mean(name, fields)}",
                remedy=f"add it; the document has {', '.join(fields)}",
            )
        return fields[name]


def _at(choices: Sequence[str], index: Any, key: str) -> str:
    if not isinstance(index, int) or not 0 <= index < len(choices):
        raise TaskError(
            f"{key} gives {index!r}, but there are {len(choices)} choices, counted from 0",
            remedy="correct the documents (a test set without answers cannot be scored) or the key",
        )
    return choices[index]


def _apart(left: str, right: str) -> bool:
    """Whether two texts need something between them: neither has white space where they meet."""
    return bool(left) and not (left[-1].isspace() or right[0].isspace())


def _common_start(texts: Sequence[str]) -> str:
    """What all of the texts begin with."""
    first, last = min(texts), max(texts)
    length = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return first[:length]


def _joined(left: str, right: str, between: str) -> str:
    """Two texts as one, with something between them where both are there and neither has white space."""
    return left + (between if right and _apart(left, right) else "") + right


def _short(template: str) -> str:
    return repr(template if len(template) <= 120 else template[:117] + "...")
