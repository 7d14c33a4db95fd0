"""Templates: what they may do, what they may not, and that what they cost is bounded."""

import time

import jinja2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval_platform.errors import TaskError
from eval_platform.tasks.templates import MAX_CHARACTERS, render_template

FIELDS = {"question": "2 + 2?", "choices": ["3", "4"], "n": 7, "nested": {"a": {"b": "c"}}}


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{question}}\n", "2 + 2?\n"),
        ("{{question.strip('?')}}", "2 + 2"),
        ("{% for c in choices %}{{loop.index}}/{{loop.length}}. {{c}}\n{% endfor %}", "1/2. 3\n2/2. 4\n"),
        ("{{choices | join(', ')}}", "3, 4"),
        ("{{nested.a.b}}{{nested['a']['b']}}", "cc"),
        ("{{question | regex_replace('[0-9]', 'N')}}", "N + N?"),
        ("{% if n > 3 %}many{% else %}few{% endif %}", "many"),
        ("{{'%05.1f' | format(n)}} {{'%d' % n}} {{'{:>3}'.format(n)}}", "007.0 7   7"),
        ("{{'ab' * 3}}", "ababab"),
        ("{% set xs = namespace(s=0) %}{% for i in range(4) %}{% set xs.s = xs.s + i %}{% endfor %}{{xs.s}}", "6"),
        ("{% macro m(x) %}{% for y in x %}<{{y}}>{% endfor %}{% endmacro %}{{m(choices)}}", "<3><4>"),
        ("{% for k, v in nested.items() %}{{k}}{% endfor %}", "a"),
        ("{% for i in range(3) if i != 1 %}{{i}}{% else %}none{% endfor %}", "02"),
        ("{{'100% of 1234567'.replace('of', 'off')}} {{'%d' % 12345678}}", "100% off 1234567 12345678"),
        ("no template at all {", "no template at all {"),
    ],
)
def test_templates_of_everyday(template: str, text: str) -> None:
    assert render_template(template, FIELDS) == text


# Unchanged Jinja with lm-eval's settings is the oracle for what a loop gives.
_words = st.lists(st.text(alphabet="abc 1é", max_size=4), max_size=5)


@given(_words, st.sampled_from(["{{x}}", "{{loop.index0}}{{x|upper}},", "{% if not loop.last %}{{x}};{% endif %}"]))
def test_bounding_loops_changes_nothing(words: list[str], body: str) -> None:
    template = f"<{{% for x in words %}}{body}{{% for y in x %}}{{{{y}}}}{{% endfor %}}{{% else %}}-{{% endfor %}}>\n"
    plain = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)

    assert render_template(template, {"words": words}) == plain.from_string(template).render(words=words)


def test_a_missing_field_is_named_with_the_nearest() -> None:
    with pytest.raises(
        TaskError, match=r"missing field: 'qestion' is undefined \(did you mean 'question'\?\)"
    ) as caught:
        render_template("{{qestion}}", FIELDS)

    assert caught.value.remedy is not None
    assert "the document has question, choices" in caught.value.remedy


@pytest.mark.parametrize(
    "template", ["{{nested.x}}", "{{choices[7]}}", "{{question.nothing}}", "{% for x in nothing %}{% endfor %}"]
)
def test_what_is_not_there_is_an_error(template: str) -> None:
    with pytest.raises(TaskError, match="names a missing field"):
        render_template(template, FIELDS)


@pytest.mark.parametrize(
    "template",
    [
        "{{''.__class__}}",
        "{{''.__class__.__mro__[1].__subclasses__()}}",
        "{{question.__init__.__globals__}}",
        "{{''['__class__']['__base__']}}",
        "{{question|attr('__class__')}}",
        "{{'{0.__class__}'.format(question)}}",
        "{{'{x.__class__}'.format_map({'x': question})}}",
        "{{self.__init__.__globals__}}",
        "{{cycler.__init__.__globals__.os}}",
        "{{namespace.__init__.__globals__}}",
        "{{joiner.__class__}}",
        "{{_budget._left}}",
        "{{[].append.__self__.__class__}}",
        "{{choices.append('5')}}",
        "{{nested.update({'x': 1})}}",
        "{{nested.pop('a')}}",
        "{{choices.clear()}}",
    ],
)
def test_nothing_leads_out_of_the_sandbox_or_changes_a_document(template: str) -> None:
    fields = {"question": "q", "choices": ["3", "4"], "nested": {"a": 1}}

    with pytest.raises(TaskError, match="tries to leave its sandbox"):
        render_template(template, fields)

    assert fields == {"question": "q", "choices": ["3", "4"], "nested": {"a": 1}}


@pytest.mark.parametrize(
    "template",
    [
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{% extends 'x' %}",
        "{{ open('/etc/passwd') }}",
        "{{ choices | random }}",
        "{{ lipsum() }}",
        "{% for x in choices %}",
        "{{ 1 / 0 }}",
        "{{ question + 1 }}",
    ],
)
def test_what_cannot_be_done_is_an_error_for_people(template: str) -> None:
    with pytest.raises(TaskError) as caught:
        render_template(template, FIELDS)

    assert caught.value.remedy


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}",
        "{% for a in many %}{% for b in many %}{% for c in many %}{% endfor %}{% endfor %}{% endfor %}",
        "{% for a in range(10**9) %}{% endfor %}",
        "{{'x' * 10**9}}",
        "{{10**9 * 'x'}}",
        "{{[1] * 10**9}}",
        "{{10 ** (10 ** 10)}}",
        "{{'x' | center(10**9)}}",
        "{{'x'.ljust(10**9)}}",
        "{{'x'.zfill(10**9)}}",
        "{{'%1000000000d' % 1}}",
        "{{'%1000000000d' | format(1)}}",
        "{{'{:1000000000}'.format(1)}}",
        "{{'%*d' % (10**9, 1)}}",
        "{{'{:{}}'.format(1, 10**9)}}",
        "{% set n = namespace(s='x') %}{% for a in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}",
        "{% for a in range(99999) %}xxxxxxxxxxxxxxx{% endfor %}",
        "{% macro m(x) %}{{m(x)}}{% endmacro %}{{m(1)}}",
    ],
)
def test_work_and_size_are_bounded(template: str) -> None:
    started = time.process_time()

    with pytest.raises(TaskError, match="more than a prompt needs"):
        render_template(template, {"many": list(range(1000))})

    assert time.process_time() - started < 5


def test_a_long_prompt_is_no_error() -> None:
    text = "word " * (MAX_CHARACTERS // 5)

    assert render_template("{{text}}", {"text": text}) == text


@given(st.text(alphabet="{}%|.'\"()[]_aq x1+*\\", max_size=30))
def test_any_text_is_rendered_or_refused(template: str) -> None:
    try:
        rendered = render_template(template, {"q": "text", "a": [1, 2]})
    except TaskError as error:
        rendered = error.remedy

    assert isinstance(rendered, str)
