"""Prompts of classes: templates, domains, or a file of yours."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from diffusers_repr.synthesis.draws import shuffled

CLASS, DOMAIN = "{class}", "{domain}"
BASE = ("an image of a {class}",)
IN_DOMAINS = ("a {domain} of a {class}",)
# MA-ZSC's, arXiv 2302.03298
DOMAINS = (
    "photo", "drawing", "painting", "sketch", "collage", "poster", "digital art", "rock drawing", "stick figure",
    "3D render",
)  # fmt: skip


class PromptSampler:
    """Which prompt an image of a class is made of: every one equally often, in an order of its own for each class.

    Args:
        prompts: Class name -> its prompts.
        seed: Of the order.

    Raises:
        ValueError: For a class without prompts, empty ones, and one that stands twice.

    Example:
        >>> sampler = PromptSampler.of_templates(["cat"], IN_DOMAINS, ["photo", "sketch"])
        >>> sorted(sampler("cat", variant) for variant in range(2))
        ['a photo of a cat', 'a sketch of a cat']
    """

    def __init__(self, prompts: Mapping[str, Sequence[str]], seed: int = 0) -> None:
        if not prompts:
            raise ValueError("No class has a prompt.")
        for name, own in prompts.items():
            if not own:
                raise ValueError(f"The class {name!r} has no prompt.")
            empty = [place for place, prompt in enumerate(own) if not prompt.strip()]
            if empty:
                raise ValueError(f"Prompt {empty[0] + 1} of the class {name!r} is empty.")
            double = next((prompt for place, prompt in enumerate(own) if prompt in own[:place]), None)
            if double is not None:
                raise ValueError(f"The class {name!r} has the prompt {double!r} twice.")
        self.prompts, self.seed = {name: tuple(own) for name, own in prompts.items()}, seed

    @classmethod
    def of_templates(
        cls, classes: Sequence[str], templates: Sequence[str] = BASE, domains: Sequence[str] = (), seed: int = 0
    ) -> PromptSampler:
        """Every template with every class, and with every domain where it has a place for one.

        Args:
            classes: Their names.
            templates: With `{class}`, and perhaps `{domain}`.
            domains: What stands for `{domain}`.
            seed: Of the order.

        Raises:
            ValueError: For a template without `{class}`, one with `{domain}` where there are none, domains that no
                template uses, and classes named twice.
        """
        if len(set(classes)) < len(classes):
            raise ValueError(f"Classes are named once each; got {', '.join(classes)}.")
        for template in templates:
            if CLASS not in template:
                raise ValueError(f"A template has {CLASS} where the name of the class stands; got {template!r}.")
        needs = [DOMAIN in template for template in templates]
        if any(needs) and not domains:
            raise ValueError(f"A template has {DOMAIN}, and there are no domains.")
        if domains and not any(needs):
            raise ValueError(f"Domains are given, and no template has {DOMAIN}: they would do nothing.")
        filled = [
            template.replace(DOMAIN, domain)
            for template, wants in zip(templates, needs, strict=True)
            for domain in (domains if wants else ("",))
        ]
        return cls({name: [text.replace(CLASS, name) for text in filled] for name in classes}, seed)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], classes: Sequence[str], seed: int = 0) -> PromptSampler:
        """Prompts of a text file, one a line: `class: prompt`.

        Args:
            path: Of the file, UTF-8.
            classes: All that are to have prompts.
            seed: Of the order.

        Raises:
            ValueError: For a file that is not UTF-8, an empty line, a line without a class, an unknown class, a prompt
                that stands twice, and a class without a prompt; names the line.
            OSError: If the file cannot be read.
        """
        found: dict[str, list[str]] = {name: [] for name in classes}
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"{str(path)!r} is no text in UTF-8 ({error.reason} at byte {error.start}).") from error
        for number, line in enumerate(lines, 1):
            name, colon, prompt = (part.strip() for part in line.partition(":"))
            if not line.strip():
                raise ValueError(f"Line {number} of {str(path)!r} is empty.")
            if not colon or not prompt:
                raise ValueError(f"Line {number} of {str(path)!r} is {line!r}; a line is CLASS: PROMPT.")
            if name not in found:
                raise ValueError(
                    f"Line {number} of {str(path)!r} names the class {name!r}; the classes are {', '.join(classes)}."
                )
            if prompt in found[name]:
                raise ValueError(f"Line {number} of {str(path)!r} has a prompt of {name!r} again: {prompt!r}.")
            found[name].append(prompt)
        return cls(found, seed)

    def __call__(self, name: str, variant: int) -> str:
        """The prompt of an image.

        Args:
            name: Of the class.
            variant: Which image of it.

        Raises:
            ValueError: For a class without prompts.
        """
        if name not in self.prompts:
            raise ValueError(f"The class {name!r} has no prompt; there are some of {', '.join(self.prompts)}.")
        own = self.prompts[name]
        turn, place = divmod(variant, len(own))
        return own[shuffled(len(own), self.seed, "prompt", name, turn)[place]]


__all__ = ["BASE", "DOMAINS", "IN_DOMAINS", "PromptSampler"]
