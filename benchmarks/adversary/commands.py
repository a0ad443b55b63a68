"""Hostile command lines: options, documents, outputs, model folders, plug-ins, run folders."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.adversary.case import Case
from tests.cli.tiny import save, text

NUMBERS = ("0", "-1", "1.5", "nan", "inf", "1e9", str(2**31), str(2**63), "1" + "0" * 23, "9" * 5000,
           "many", "", " ", "0x10", "\u0663", "1_0")  # fmt: skip
TEXTS = ("", " ", "-", "--", "\x00", "\x1b[2J", "<script>alert(1)</script>", "{{7*7}}", "%s%n",
         "[bold]x[/bold]", "[/]", "caf\u00e9\u202e", "\udcff", "x" * 20000, "<|im_end|>", "~nouser/x",
         "../../etc/passwd", "'; --", "\n\n", "\ufeff")  # fmt: skip
RECIPES = ("", "@", "buzz@", "@0.4", "h2o@0", "h2o@-1", "h2o@nan", "h2o@1e400", "h2o@40%%", "h2o@0.4@0.4",
           "h2o(@0.4", "h2o)@0.4", "h2o()()@0.4", "h2o(recent=)@0.4", "h2o(=3)@0.4", "h2o(recent)@0.4",
           "h2o@0.4/", "h2o@0.4+", "h2o@0.4/uniform/uniform", "h2o@0.4+dense+dense", "h2o@0.4/dense",
           "h2o@" + "9" * 5000, "h2o(" * 500, "buzz(sink=1000000000000000000)@0.4", "full@0.4", "h2o",
           "h2o(slack=nan)@64", "h2o(slack=-1)@64", "h2o(positions=up)@64", "H2O@0.4", "h2o @ 0.4",
           "h2o@0.4 ", "h2o\u200b@0.4", "__import__('os')@0.4", "h2o(recent=__import__('os'))@4",
           "corm", "l2norm(skip_layers=[99])@40", "l2norm(skip_layers=[0,1])@40")  # fmt: skip
SINGLE = {  # options that take a value, by command, and what else the command needs
    "compare": ("--ask", "--recipe", "--max-new-tokens", "--mode", "--prefill-chunk", "--max-tokens",
                "--dtype", "--device", "--threads", "--model", "--html", "--plugin", "--fit",
                "--sweep", "--kl"),
    "show": ("--recipe", "--html", "--prefill-chunk", "--max-tokens", "--dtype", "--device",
             "--threads", "--model", "--plugin", "--fit"),
    "generate": ("--recipe", "--max-new-tokens", "--temperature", "--top-p", "--top-k", "--seed",
                 "--prefill-chunk", "--dtype", "--device", "--threads", "--model", "--plugin"),
    "evaluate": ("--recipe", "--task", "--mode", "--limit", "--seed", "--data", "--block", "--threads",
                 "--workers", "--dtype", "--device", "--model", "--plugin"),
    "report": ("--against", "--csv", "--markdown", "--html", "--plugin"),
    "plan": ("--model", "--context", "--batch", "--memory", "--recipe", "--dtype"),
    "recipes": (),
    "doctor": ("--model",),
}  # fmt: skip
NUMERIC = ("--max-new-tokens", "--prefill-chunk", "--max-tokens", "--threads", "--seed", "--limit",
           "--block", "--temperature", "--top-p", "--top-k", "--workers", "--batch", "--kl", "--context",
           "--memory", "--fit")  # fmt: skip


def cases(place: Path) -> Iterator[Case]:
    """place: an empty folder for models, documents and outputs."""
    bench = Bench(place)
    for part in (
        bench.options,
        bench.documents,
        bench.outputs,
        bench.models,
        bench.plugins,
        bench.runs,
    ):
        yield from part()


class Bench:
    """A tiny model, a document and a run in a folder."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.model = save(place / "tiny")
        self.document = place / "doc.md"
        self.document.write_text(text(60), encoding="utf-8")
        self.run = place / "run"
        _command(["evaluate", "--model", str(self.model), "--dtype", "float32", "-t", "passkey(lengths=[200])", "--data", "builtin",
                  "--limit", "2", "-r", "h2o@40", "--mode", "agnostic", "--out", str(self.run)])  # fmt: skip
        self.guarded = (self.document, *sorted(self.model.iterdir()), *sorted(self.run.iterdir()))

    def case(
        self,
        *words: str,
        stdin: bytes | None = b"",
        guard: tuple[Path, ...] = (),
        only: tuple[Path, ...] | None = None,
        before: Callable[[], object] | None = None,
    ) -> Case:
        """A command; unless it names a model, the tiny one. guard: besides the usual files; only:
        instead of them.
        """
        line = [str(word) for word in words]
        takes_model = line[0] in ("compare", "show", "generate", "evaluate", "plan")
        if takes_model and not {"--model", "-m"} & set(line):
            line += ["--model", str(self.model)]
            line += ["--dtype", "float32"] if "--dtype" not in line and line[0] != "plan" else []
        name = " ".join(word if len(word) < 60 else word[:60] + "..." for word in line)
        name = name.replace(str(self.place), ".").encode("unicode_escape").decode()
        guarded = (*self.guarded, *guard) if only is None else only
        return Case(name, lambda: _command(line), stdin, guarded, before)

    def usual(self, command: str) -> list[str]:
        """What the command needs to work."""
        short = ["--max-new-tokens", "2"]
        return {
            "compare": ["compare", str(self.document), "-r", "h2o@40", *short],
            "show": ["show", str(self.document)],
            "generate": ["generate", "hello there", *short],
            "evaluate": ["evaluate", "-t", "passkey(lengths=[200])", "--data", "builtin", "--limit", "1", "-r", "h2o@40",
                         "--out", str(self.place / f"new{next(_COUNTER)}")],
            "report": ["report", str(self.run)],
            "plan": ["plan", "--context", "2k", "--memory", "1GiB"],
            "recipes": ["recipes"],
            "doctor": ["doctor"],
        }[command]  # fmt: skip

    def options(self) -> Iterator[Case]:
        """Every option with numbers, texts and recipes that it did not expect."""
        for command, options in SINGLE.items():
            for option in options:
                values = NUMBERS if option in NUMERIC else TEXTS
                values = RECIPES if option in ("--recipe", "--against") else values
                for value in values:
                    yield self.case(*self.usual(command), option, value)
            for wrong in (["--nonsense"], ["--help"], ["extra", "words"], ["--json"], ["--quiet"]):
                yield self.case(*self.usual(command), *wrong)
        for name in TEXTS:
            yield self.case("recipes", name)
            yield self.case("generate", name, "--max-new-tokens", "2")
            yield self.case(name or "''")

    def documents(self) -> Iterator[Case]:
        """Documents that are none."""
        contents = {
            "empty": b"", "space": b" \n\t", "null": b"\0" * 100, "elf": b"\x7fELF\0", "latin": b"caf\xe9",
            "utf16": b"\xff\xfea", "pdf": b"%PDF-1.7 nothing", "pdf2": b"%PDF-1.4\n1 0 obj\n<<>>\nendobj",
            "long": b"word " * 400_000, "tokens": b"<|end|><|start|>" * 20, "bom": b"\xef\xbb\xbf",
            "controls": bytes(range(1, 32)), "line": b"a" * 3000, "rtl": "\u202eabc \u2066".encode(),
        }  # fmt: skip
        for name, content in contents.items():
            path = self.place / name
            path.write_bytes(content)
            for command in ("compare", "show"):
                yield self.case(command, str(path), *(["-r", "h2o@40"]))
                yield self.case(command, "-", stdin=content)
        pipe = self.place / "pipe"
        os.mkfifo(pipe)
        loop, gone = self.place / "loop", self.place / "gone"
        loop.symlink_to(loop)
        gone.symlink_to(self.place / "nowhere")
        for path in (pipe, loop, gone, self.place, "/dev/zero", "/dev/null", "/dev/tty", "/proc/self/mem",
                     "/nowhere", "~nouser/x", "a\udcff.md", "x" * 5000, f"{self.document}/x"):  # fmt: skip
            yield self.case("compare", str(path))
            yield self.case("show", str(path))
        for words in (["compare", "-"], ["show", "-"], ["generate", "-"], ["generate", "--chat"]):
            yield self.case(*words, stdin=None)
            yield self.case(*words, stdin=b"")
            yield self.case(*words, stdin=b"\xff\xfe\x00")

    def outputs(self) -> Iterator[Case]:
        """Outputs where something else is."""
        other = self.place / "thesis.html"
        other.write_text("years of work")
        locked = self.place / "locked.html"
        locked.write_text("locked")
        locked.chmod(0o444)
        link = self.place / "link.html"
        link.symlink_to(other)
        hard = self.place / "hard.md"
        os.link(self.document, hard)
        places = [self.document, hard, other, locked, link, self.place, self.place / "no" / "x.html",
                  self.place / "loop", self.place / "pipe", "/dev/null", "/dev/full", "/dev/stderr",
                  "/proc/self/mem", "/sys/x", "/dev/fd/2", "~nouser/x", "x" * 300, "a\udcff",
                  self.model / "config.json", self.model / "model.safetensors", f"{self.document}/x",
                  self.run / "rows.jsonl", self.run / "run.json", "", " "]  # fmt: skip

        def strangers() -> None:
            other.write_text("years of work")

        commands = {
            "compare": ["--html"],
            "show": ["--html"],
            "report": ["--html", "--csv", "--markdown"],
        }
        model = (self.document, *sorted(self.model.iterdir()))
        read = {"report": tuple(sorted(self.run.iterdir())), "compare": model, "show": model}
        for place in places:
            for command, options in commands.items():
                mine = read[command]
                for option in options:
                    words = [*self.usual(command), option, str(place)]
                    never = (locked, Path("/dev/null"))
                    yield self.case(*words, guard=(*never, other, link, hard), before=strangers)
                    # What the command reads stays even then; a stranger's file may go.
                    yield self.case(*words, "--force", only=(*mine, *never), before=strangers)
        same = str(self.place / "same")
        yield self.case("report", str(self.run), "--html", same, "--csv", same)
        yield self.case("report", str(self.run), "--html", "-", "--csv", "/dev/stdout")
        yield self.case("evaluate", "-t", "passkey", "--out", str(self.document))
        yield self.case("evaluate", "-t", "passkey", "--out", str(self.model))
        yield self.case("evaluate", "-t", "passkey", "--out", "/dev/null")

    def models(self) -> Iterator[Case]:
        """Damaged model folders."""
        edits = {
            "config.json": ['"hidden_size": 32|"hidden_size": 100', '"hidden_size": 32|"hidden_size": -1',
                            '"hidden_size": 32|"hidden_size": "a"', '"num_hidden_layers": 2|"num_hidden_layers": 3',
                            '"num_hidden_layers": 2|"num_hidden_layers": 0', '"model_type": "llama"|"model_type": "x"',
                            '"model_type": "llama"|"model_type": "t5"', '"rope_type": "default"|"rope_type": "x"',
                            '"vocab_size": 258|"vocab_size": 5', '{|[', '{|', '"num_key_value_heads": 2|"num_key_value_heads": 3',
                            '"max_position_embeddings": 1024|"max_position_embeddings": "a"',
                            '"eos_token_id": 256|"eos_token_id": "a"', '"head_dim": 8|"head_dim": 0'],
            "tokenizer.json": ['"model": {|"model": 7, "was": {', '{|', '"type": "BPE"|"type": "X"', '"vocab": {|"vocab": {}, "was": {'],
            "tokenizer_config.json": ['{|', '{|[', '"tokenizer_class": |"tokenizer_class": 5, "x": '],
            "generation_config.json": ['{|', '"eos_token_id": 256|"eos_token_id": "a"'],
        }  # fmt: skip
        templates = ("{{ nope", "{% for x in %}", "{{ messages[99].content }}", "{{ 1/0 }}", "", "fixed words",
                     "{{ raise_exception('no') }}", "{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}")  # fmt: skip
        number = 0
        for file, pairs in edits.items():
            for pair in pairs:
                old, _, new = pair.partition("|")
                folder = self._copy(number := number + 1)
                path = folder / file
                if not path.exists():
                    continue
                path.write_text(path.read_text("utf-8").replace(old, new, 1), "utf-8")
                yield from self._use(folder)
        for template in templates:
            folder = self._copy(number := number + 1)
            (folder / "chat_template.jinja").write_text(template)
            yield from self._use(folder)
        for file in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
            for damage in ("missing", "empty", "cut", "binary", "folder"):
                folder = self._copy(number := number + 1)
                _damage(folder / file, damage)
                yield from self._use(folder)
        for name in (
            "smollm3",
            "gpt2",
            "a/b",
            "a/b/c",
            "/dev/null",
            "x.gguf",
            "\x00",
            str(self.document),
        ):
            yield self.case(*self.usual("generate"), "--model", name)
            yield self.case(*self.usual("plan"), "--model", name)

    def plugins(self) -> Iterator[Case]:
        """Plug-ins with errors of their own."""
        policy = (
            "from dataclasses import dataclass\nfrom kvhive.policies import POLICIES, Policy\n"
            "@POLICIES.register('mine')\n@dataclass(frozen=True)\nclass Mine(Policy):\n    'Mine.'\n"
            "    source = 'a test'\n    cost = 'none'\n"
        )
        sources = {
            "syntax": "def f(:", "raises": "1/0", "exits": "raise SystemExit(3)", "empty": "",
            "imports": "import nothing_of_that_name", "null": "\0", "twice": policy.replace("mine", "h2o"),
            "unfinished": policy, "keyerror": policy + "    def score(self, slots, held):\n        return {}['a']\n",
            "shape": policy + "    def score(self, slots, held):\n        return held.keys[:, :1]\n",
            "kind": "from kvhive.policies import POLICIES\nPOLICIES.register('mine')(int)\n",
        }  # fmt: skip
        for name, source in sources.items():
            path = self.place / f"{name}_plugin.py"
            path.write_text(source)
            for words in (self.usual("compare"), self.usual("show"), self.usual("generate")):
                yield self.case(*words, "--plugin", str(path), "-r", "mine@40")
            yield self.case("recipes", "mine", "--plugin", str(path))
            yield self.case(*self.usual("evaluate"), "--plugin", str(path), "-r", "mine@40")

    def runs(self) -> Iterator[Case]:
        """Run folders with rows of wrong types."""
        rows = [
            json.loads(line) for line in (self.run / "rows.jsonl").read_text("utf-8").splitlines()
        ]
        settings = json.loads((self.run / "run.json").read_text("utf-8"))
        values = (None, 5, -1, "x", [], {}, [1], "<script>", 1e308, True)
        number = 0
        for field in rows[0]:
            for value in values:
                folder = self._run(number := number + 1)
                changed = [{**rows[0], field: value}, *rows[1:]]
                lines = "".join(json.dumps(row) + "\n" for row in changed)
                (folder / "rows.jsonl").write_text(lines, "utf-8")
                yield self.case("report", str(folder), "--html", str(folder / "page.html"))
        for part in ("settings", "facts"):
            for field in settings[part]:
                for value in values[:6]:
                    folder = self._run(number := number + 1)
                    wrong = {**settings, part: {**settings[part], field: value}}
                    (folder / "run.json").write_text(json.dumps(wrong), "utf-8")
                    yield self.case("report", str(folder), "--html", str(folder / "page.html"))
        for file in ("run.json", "rows.jsonl"):
            for damage in ("missing", "empty", "cut", "binary", "folder", "pipe"):
                folder = self._run(number := number + 1)
                _damage(folder / file, damage)
                yield self.case("report", str(folder))
                yield self.case(*self.usual("evaluate"), "--out", str(folder))

    def _use(self, folder: Path) -> Iterator[Case]:
        yield self.case(*self.usual("generate"), "--model", str(folder))
        yield self.case(*self.usual("compare"), "--model", str(folder))
        yield self.case("doctor", "--model", str(folder))

    def _copy(self, number: int) -> Path:
        return Path(shutil.copytree(self.model, self.place / f"model{number}"))

    def _run(self, number: int) -> Path:
        return Path(shutil.copytree(self.run, self.place / f"run{number}"))


def _damage(path: Path, how: str) -> None:
    whole = path.read_bytes()
    path.unlink()
    if how == "folder":
        path.mkdir()
    elif how == "pipe":
        os.mkfifo(path)
    elif how != "missing":
        path.write_bytes(
            {"empty": b"", "cut": whole[: len(whole) // 2], "binary": bytes(range(256))}[how]
        )


def _command(line: list[str]) -> int:
    from kvhive.cli import main

    sys.argv = ["kvhive", *line]
    try:
        main()
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else 1
    return 0


_COUNTER = iter(range(10**6))
