"""For mkdocstrings: a function whose arguments have their shapes in comments beside them is shown with its signature as the source has it."""

import re

import griffe


class SourceSignatures(griffe.Extension):
    """Puts such a signature in front of the docstring; the page's option show_signature: false leaves the other one out."""

    def on_function(self, *, func: griffe.Function, **_kwargs) -> None:
        signature = re.match(r"def .*?^\)[^\n]*:$", func.source, re.M | re.S)
        if signature and "  # (" in signature[0] and func.docstring:
            func.docstring.value = f"```python\n{signature[0].removesuffix(':')}\n```\n\n{func.docstring.value}"
