"""The training text: the running Python's own standard library, as files, documentation topics, snippets and chats.

Order and content depend only on the Python version and the seed. Held-out modules give no text to any of it.
"""

from __future__ import annotations

import ast
import inspect
import random
import sysconfig
import textwrap
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

BOS, EOS, SYSTEM, USER, ASSISTANT, END = "<|bos|>", "<|eos|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"
SPECIAL_TOKENS = (BOS, EOS, SYSTEM, USER, ASSISTANT, END)

# Never trained on, by the model or the tokenizer: several small modules of different kinds, about 3% of the text.
HELD_OUT_MODULES = (
    "colorsys",
    "csv",
    "fractions",
    "graphlib",
    "heapq",
    "json",
    "sched",
    "shlex",
    "statistics",
    "textwrap",
    "zipapp",
)

# Not the library's own source: third-party packages, tests and their data, and generated tables.
_SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib-dynload", "ensurepip", "__pycache__", "__phello__"}
)
_SKIPPED_FILES = frozenset({"html/entities.py", "pydoc_data/topics.py"})
_TOPICS_FILE = "pydoc_data/topics.py"

_SYSTEM_PROMPTS = (
    "You are a helpful assistant that writes Python.",
    "You are a Python programmer. Answer with code.",
    "Answer questions about the Python standard library.",
)
_MAX_ANSWER_CHARS = 4000
_MAX_TOPIC_CHARS = 1600


class Document(NamedTuple):
    name: str
    text: str  # with its special tokens, from <|bos|> to <|eos|>


class Message(NamedTuple):
    role: str  # "system", "user" or "assistant"
    content: str


@dataclass(frozen=True, slots=True)
class Corpus:
    """What is learned (files, topics, snippets, chats) and what is only measured (held_out)."""

    files: tuple[Document, ...]
    topics: tuple[Document, ...]
    snippets: tuple[Document, ...]
    chats: tuple[Document, ...]
    held_out: tuple[Document, ...]

    def tokenizer_texts(self) -> Iterator[str]:
        """Bare text, without special tokens: the trainer would learn pieces of their spelling."""
        return (document.text.removeprefix(BOS).removesuffix(EOS) for document in self.files + self.topics)

    def summary(self) -> list[str]:
        groups = {"files": self.files, "topics": self.topics, "snippets": self.snippets, "chats": self.chats, "held out": self.held_out}
        return [f"{name}: {len(docs)} documents, {num_bytes(docs) / 1e6:.2f} MB" for name, docs in groups.items()]


def num_bytes(documents: tuple[Document, ...]) -> int:
    return sum(len(document.text.encode()) for document in documents)


def render_chat(messages: list[Message]) -> str:
    """The chat format. The Jinja template that is shipped with the tokenizer must give the same text."""
    marks = {"system": SYSTEM, "user": USER, "assistant": ASSISTANT}
    return BOS + "".join(f"{marks[message.role]}{message.content}{END}" for message in messages)


def load_corpus(seed: int, max_files: int | None = None, stdlib: Path | None = None) -> Corpus:
    """Reads the standard library.

    max_files thins both the trained and the held-out files evenly (for a quick run).
    Raises FileNotFoundError when the folder has no sources (some installations ship only byte code).
    """
    root = stdlib or Path(sysconfig.get_paths()["stdlib"])
    sources = dict(_read_sources(root))
    held_out = {path: text for path, text in sources.items() if _module_name(path).split(".")[0] in HELD_OUT_MODULES}
    trained = {path: text for path, text in sources.items() if path not in held_out}
    if not held_out or not trained:
        raise FileNotFoundError(f"no standard library sources under {root}: install the full Python, sources included")
    topics = _read_topics(root)
    if max_files is not None:
        trained, held_out, topics = _thin(trained, max_files), _thin(held_out, max_files), _thin(topics, max_files)
    rng = random.Random(seed)
    items = [item for path, text in trained.items() for item in _definitions(_module_name(path), text)]
    return Corpus(
        files=tuple(Document(path, f"{BOS}{text}{EOS}") for path, text in trained.items()),
        topics=tuple(Document(f"topic:{name}", f"{BOS}{text}{EOS}") for name, text in topics.items()),
        snippets=tuple(Document(item.qualified_name, f"{BOS}{item.source}{EOS}") for item in items),
        chats=tuple(_chats(items, topics, rng)),
        held_out=tuple(Document(path, f"{BOS}{text}{EOS}") for path, text in held_out.items()),
    )


def _thin(texts: dict[str, str], num_kept: int) -> dict[str, str]:
    small = {name: text for name, text in texts.items() if len(text) < 30_000}
    return dict(list(small.items())[:: max(1, len(small) // num_kept)][:num_kept])


def _read_sources(root: Path) -> Iterator[tuple[str, str]]:
    """(path below root, text) of every kept source, by path."""
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _SKIPPED_FOLDERS.intersection(relative.parts) or relative.as_posix() in _SKIPPED_FILES:
            continue
        if relative.parts[0].startswith(("config-", "_sysconfigdata")):  # written by the build: this machine's paths and flags
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        is_code_page = relative.parts[0] == "encodings" and "Character Mapping Codec" in text
        if text.strip() and not is_code_page and not any(token in text for token in SPECIAL_TOKENS):
            yield relative.as_posix(), text


def _read_topics(root: Path) -> dict[str, str]:
    """The documentation that `help('topic')` shows, from the one dictionary of its generated module; empty if not installed."""
    path = root / _TOPICS_FILE
    if not path.exists():
        return {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            topics: dict[str, str] = ast.literal_eval(node.value)
            return dict(sorted(topics.items()))
    return {}


def _module_name(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


class _Definition(NamedTuple):
    module: str
    name: str  # dotted below the module: Class.method
    kind: str  # "function", "method" or "class"
    source: str  # dedented, decorators included
    docstring: str

    @property
    def qualified_name(self) -> str:
        return f"{self.module}.{self.name}"


def _definitions(module: str, text: str) -> Iterator[_Definition]:
    """Every function, method and class with a docstring and a source of moderate length. Nothing for a file this Python cannot parse."""
    lines = text.splitlines(keepends=True)

    def visit(node: ast.AST, prefix: str) -> Iterator[_Definition]:
        for child in ast.iter_child_nodes(node):
            if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                continue
            name = prefix + child.name
            kind = "class" if isinstance(child, ast.ClassDef) else "method" if prefix else "function"
            first_line = min([child.lineno, *(decorator.lineno for decorator in child.decorator_list)])
            source = textwrap.dedent("".join(lines[first_line - 1 : child.end_lineno]))
            docstring = inspect.cleandoc(ast.get_docstring(child, clean=False) or "")
            if docstring and len(source) <= _MAX_ANSWER_CHARS:
                yield _Definition(module, name, kind, source, docstring)
            if isinstance(child, ast.ClassDef):
                yield from visit(child, f"{name}.")

    try:
        with warnings.catch_warnings(action="ignore"):  # old escapes in some files: not ours to mend
            tree = ast.parse(text)
    except SyntaxError:
        return
    yield from visit(tree, "")


def _chats(items: list[_Definition], topics: dict[str, str], rng: random.Random) -> Iterator[Document]:
    """One conversation for each definition and topic: mostly one question, sometimes two, a third under a system prompt."""
    for item in items:
        turns = [_write_turn(item, rng), _explain_turn(item, rng)]
        rng.shuffle(turns)
        yield _conversation(item.qualified_name, turns[: 1 if rng.random() < 0.75 else 2], rng)
    for name, text in topics.items():
        question = rng.choice(('Explain "{}" in Python.', 'What does the Python documentation say about "{}"?')).format(name)
        yield _conversation(f"topic:{name}", [(question, _first_paragraphs(text))], rng)


def _conversation(name: str, turns: list[tuple[str, str]], rng: random.Random) -> Document:
    system = [Message("system", rng.choice(_SYSTEM_PROMPTS))] if rng.random() < 1 / 3 else []
    asked = [message for question, answer in turns for message in (Message("user", question), Message("assistant", answer))]
    return Document(f"chat:{name}", render_chat(system + asked) + EOS)


def _write_turn(item: _Definition, rng: random.Random) -> tuple[str, str]:
    purpose = item.docstring.splitlines()[0]
    forms = (
        f"Write the {item.kind} `{item.name}` of module `{item.module}`: {purpose}",
        f"Write a Python {item.kind} `{item.name}`. {purpose}",
        f"Write a {item.kind} named {item.name.split('.')[-1]}: {purpose}",
    )
    return rng.choice(forms), item.source.rstrip("\n")


def _explain_turn(item: _Definition, rng: random.Random) -> tuple[str, str]:
    forms = (
        f"What does `{item.qualified_name}` do?",
        f"Explain the {item.kind} `{item.name}` of module `{item.module}`.",
        f"What is {item.qualified_name}?",
    )
    return rng.choice(forms), item.docstring


def _first_paragraphs(text: str) -> str:
    if len(text) <= _MAX_TOPIC_CHARS:
        return text.strip()
    cut = text.rfind("\n\n", 0, _MAX_TOPIC_CHARS)
    return text[: cut if cut > 0 else _MAX_TOPIC_CHARS].strip()
