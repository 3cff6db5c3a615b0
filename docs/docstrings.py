"""How the site reads docstrings, see `.mkdocs.yml`: doctests, comments on fields, links.

They are written to be read by `help`. Their examples come last and have no heading, a named tuple
says in a comment what a field is, and public names stand in backticks.
"""

import re
from pathlib import Path

import griffe

_NAMES = re.compile(r'^    "(\w+)",$', re.MULTILINE)  # of __all__
_QUOTED = re.compile(r"(?<!`)`(?:jq\.|jaxquant\.)?(\w+)`(?!`)")
_CODE = re.compile(r"(`+[^`]+`+)")
_STARS = re.compile(r"(?m)^ *\*\*\w+:|(?<![\w*])\*\w+\*(?![\w*])|\*")  # the last one is no Markdown
_FIELD = re.compile(r"^    (\w+): [^#]*#\s*(.+)$")
_AMBIGUOUS = {"init", "product"}  # options of clustering and a word, more often than names


def _escape(match: re.Match) -> str:
    return r"\*" if match[0] == "*" else match[0]


class Docstrings(griffe.Extension):
    """Rewrite each docstring once, before it is parsed."""

    def __init__(self) -> None:
        """Read the public names."""
        text = Path("jaxquant/__init__.py").read_text()
        self.public = set(_NAMES.findall(text)) - _AMBIGUOUS

    def on_class(self, *, cls: griffe.Class, **kwargs: object) -> None:
        """Describe the fields of a class by their comments, then do as for all objects."""
        if cls.docstring and "Attributes:" not in cls.docstring.value and cls.lines:
            fields = list(filter(None, map(_FIELD.match, cls.lines)))
            if fields:
                lines = [f"    {name}: {comment}" for name, comment in (f.groups() for f in fields)]
                cls.docstring.value += "\n\nAttributes:\n" + "\n".join(lines)
        self._rewrite(cls)

    def on_function(self, *, func: griffe.Function, **kwargs: object) -> None:
        """Rewrite the docstring."""
        self._rewrite(func)

    def on_attribute(self, *, attr: griffe.Attribute, **kwargs: object) -> None:
        """Rewrite the docstring, a property's among others."""
        self._rewrite(attr)

    def _rewrite(self, obj: griffe.Object) -> None:
        if not obj.docstring:
            return
        text, prompt, examples = obj.docstring.value.partition("\n>>>")
        own = {obj.name, *(p.name for p in getattr(obj, "parameters", ()))}

        def link(match: re.Match) -> str:
            name = match[1]
            known = name in self.public and name not in own
            return f"[{match[0]}][jaxquant.{name}]" if known else match[0]

        parts = _CODE.split(text)
        parts[::2] = [_STARS.sub(_escape, part) for part in parts[::2]]
        text = _QUOTED.sub(link, "".join(parts))
        if prompt:
            lines = (prompt[1:] + examples).splitlines()
            text += "\n\nExamples:\n" + "\n".join(f"    {line}".rstrip() for line in lines)
        obj.docstring.value = text
