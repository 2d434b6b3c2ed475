"""Templates that print today's date, made to print one day: tokens must not depend on the day of the run."""

from __future__ import annotations

from datetime import date
from functools import cache

_DIRECTIVES = ("-d", "-m", "-j", "-y", "e", *"aAbBdmyYjUuVwWGFDHIMSpxXc")


@cache
def with_frozen_date(template: str, day: str) -> str:
    """The chat template, with ``strftime_now`` defined as the midnight that begins ``day``.

    The function is defined in the template's own language, as a macro before it: the environment that renders templates
    belongs to transformers, and takes no functions.

    Args:
        template: Jinja text; unchanged where it does not name ``strftime_now``.
        day: ``YYYY-MM-DD``.
    """
    if "strftime_now" not in template:
        return template
    moment = date.fromisoformat(day)
    replaced = "".join(f" | replace('%{directive}', '{moment.strftime('%' + directive)}')" for directive in _DIRECTIVES)
    # The empty expression keeps a line break at the start of the template, which would be trimmed after a block.
    return "{% macro strftime_now(format) %}{{ format" + replaced + " }}{% endmacro %}{{ '' }}" + template
