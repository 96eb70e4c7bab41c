"""What each verb of `megatron-steel` does: one function a verb, named after it, that calls one room and prints the result.

(`import` is a keyword, so its function is `import_hf`.) Rooms are imported inside, so that `--help` is instant. Must not
know how arguments are written; that is `cli`.
"""

import json
from pathlib import Path
from typing import Any


def pretrain(recipe: str, overrides: list[str], dry_run: bool) -> None:
    from megatron_steel.pretrain import run

    run(recipe, overrides, dry_run)


def launch(recipe: str, overrides: list[str], num_gpus: int | None, hostfile: str | None) -> None:
    from megatron_steel.supervise import launch

    launch(recipe, overrides, num_gpus, hostfile)


def recipes(words: list[str], params: str | None, vocab_size: int | None, output: str | None) -> None:
    from megatron_steel import catalogue

    if not words and not (params or vocab_size or output):
        print(catalogue.as_text())
    elif len(words) == 2 and words[0] == "show" and not (params or vocab_size or output):
        print(catalogue.show(words[1]), end="")
    elif len(words) == 2 and words[0] == "scale" and params:
        from megatron_steel.scale import scale

        _write_or_print(scale(words[1], params, vocab_size), output)
    else:
        raise _usage("recipes, recipes show NAME, or recipes scale NAME --params 50m [--vocab-size N] [--output FILE]")


def plan(recipe: str | None, overrides: list[str], **options: Any) -> None:
    from megatron_steel.planner import command

    _require_folder(options["json_file"])
    tree, text = command.run(recipe, overrides, options)
    print(text)
    _write_json(options["json_file"], tree)


def prepare(source: str, inputs: list[str], output: str | None, fetch: str | None, **options: Any) -> None:
    hub, sample = options.pop("hub"), options.pop("sample")
    if fetch and not inputs and not output:
        from megatron_steel.data.fetch import fetch as download

        download(source, fetch, hub, sample)
        return
    if fetch or not output or not inputs:
        raise _usage("megatron-steel prepare SOURCE INPUT... --output FILE.jsonl, or prepare SOURCE --fetch DIR")
    from megatron_steel.data.prepare import prepare, table

    print(table(prepare(source, inputs, output, **options)))


def tokenize(inputs: list[str], **settings: Any) -> None:
    from megatron_steel.data.tokenize import tokenize

    tokenize(inputs, **settings)


def clean(inputs: list[str], **settings: Any) -> None:
    from megatron_steel.data.clean.report import table
    from megatron_steel.data.clean.run import clean

    print(table(clean(inputs, **settings)), end="")


def train_tokenizer(inputs: list[str], output: str, vocab_size: int, compare: list[str]) -> None:
    from megatron_steel.data.train_tokenizer import train_tokenizer

    for path, figure in train_tokenizer(inputs, output, vocab_size, compare=compare).items():
        print(f"{path}: {figure:.3f} characters per token on held-out text")


def prune_tokenizer(source: str, prefixes: list[str], vocab_size: int, output: str) -> None:
    from megatron_steel.data.prune_tokenizer import prune_tokenizer

    share = prune_tokenizer(source, prefixes, vocab_size, output)
    print(f"{output}: {vocab_size:,} ids; {share:.3%} of the data's tokens keep their id")


def verify(prefixes: list[str]) -> None:
    from megatron_steel.data.manifest import verify
    from megatron_steel.errors import SteelError

    problems = []
    for prefix in prefixes:
        try:
            manifest = verify(prefix)
            print(f"{prefix}: whole, {manifest.documents:,} documents, {manifest.tokens:,} tokens", flush=True)
        except SteelError as problem:  # the others are looked at all the same
            problems.append(problem)
    if len(problems) > 1:
        whats = "".join(f"\n    {problem.where}: {problem.what}" for problem in problems)
        raise SteelError(f"{len(problems)} of {len(prefixes)} data sets fail:{whats}", "verify", problems[0].remedy)
    if problems:
        raise problems[0]


def inspect(
    target: str, tokenizer: str | None, step: int | None, rank: int | None, json_file: str | None, picture: str | None
) -> None:
    is_run = (Path(target) / "checkpoints").is_dir() or (Path(target) / "recipe.yaml").is_file()
    if (is_run and picture) or (not is_run and step is not None) or (rank is not None and step is None):
        raise _usage("inspect PREFIX [--tokenizer T] [--picture F] [--json F], or inspect RUN [--step N [--rank R]]")
    _require_folder(json_file)
    if not is_run:
        _inspect_data(target, tokenizer, json_file, picture)
        return
    from megatron_steel import inspect_run

    if step is None:
        print(inspect_run.checkpoints_of(Path(target)))
        return
    found = inspect_run.look(Path(target), step, rank, tokenizer)
    for line in inspect_run.as_text(found):
        print(line)
    _write_json(json_file, inspect_run.to_json(found), indent=None)


def _inspect_data(prefix: str, tokenizer: str | None, json_file: str | None, picture: str | None) -> None:
    from megatron_steel.data import inspect
    from megatron_steel.data.tokenizer import load_tokenizer

    report = inspect.look(prefix, load_tokenizer(tokenizer) if tokenizer else None)
    print(inspect.as_text(report))
    _write_json(json_file, report.to_json())
    if picture:
        inspect.draw(report, picture)


def report(run: str, output: str | None, price_per_gpu_hour: float | None) -> None:
    from megatron_steel.run_report.page import write_report

    print(write_report(run, output, price_per_gpu_hour))


def merge(prefixes: list[str], output: str) -> None:
    from megatron_steel.data.merge import merge

    manifest = merge(prefixes, output)
    print(f"{output}: {manifest.documents:,} documents, {manifest.tokens:,} tokens")


def export(source: str, output: str, **options: Any) -> None:
    from megatron_steel.audit import verdict_of
    from megatron_steel.convert.hf import export

    export(source, output, audit=verdict_of, **options)


def import_hf(source: str, output: str, layers: str | None, **settings: Any) -> None:
    from megatron_steel.convert.import_hf import import_hf
    from megatron_steel.convert.inherit import parse_layers

    import_hf(source, output, layers=parse_layers(layers) if layers is not None else None, **settings)


def sft_data(spec: str, output: str, force_test_splits: bool, workers: int | None) -> None:
    from megatron_steel.post.sft_data.build import sft_data
    from megatron_steel.post.sft_data.report import table

    print(table(sft_data(spec, output, force_test_splits, workers)))


def sft(model: str, data: str, **settings: Any) -> None:
    from megatron_steel.tune import tune

    tune("sft", model, data, **settings)


def dpo(model: str, data: str, **settings: Any) -> None:
    from megatron_steel.tune import tune

    tune("dpo", model, data, packing=False, **settings)


def resample(model: str, prefixes: list[str], output: str, **settings: Any) -> None:
    from megatron_steel.post.resample import resample, table

    print(table(resample(model, prefixes, output, **settings)))


def audit(source: str, **settings: Any) -> None:
    from megatron_steel.audit import audit

    audit(source, **settings)


def generate(model: str, prompt: str | None, chat: bool, **settings: Any) -> None:
    if chat:
        from megatron_steel.post.chat import chat as talk

        talk(model, **settings)
        return
    from megatron_steel.post.generate import generate

    print(generate(model, prompt or "", **settings))


def evaluate(models: list[str], tasks: str, **settings: Any) -> None:
    from megatron_steel.audit import verdict_of
    from megatron_steel.post.scoring.evaluate import evaluate

    evaluate(models, [task.strip() for task in tasks.split(",") if task.strip()], **settings, audit=verdict_of)


def _write_or_print(text: str, output: str | None) -> None:
    if output is None:
        print(text, end="")
        return
    from megatron_steel.errors import SteelError

    try:
        with open(output, "x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise SteelError(f"the recipe could not be written: {error.strerror}", output, "name another file") from None


def _require_folder(file: str | None) -> None:
    """Raises SteelError, before anything is computed or printed, where `file` could not be written."""
    from megatron_steel.errors import SteelError

    if file and Path(file).is_dir():
        raise SteelError("a folder stands where the JSON should go", file, "name a file in it")
    if file and not Path(file).absolute().parent.is_dir():
        raise SteelError("the folder for this file does not exist", file, "make it, or name another file")


def _write_json(file: str | None, tree: dict[str, Any], indent: int | None = 1) -> None:
    if file:
        from megatron_steel.data.reserve import published

        with published(file) as aside:
            Path(aside).write_text(json.dumps(tree, indent=indent, ensure_ascii=False), encoding="utf-8")


def _usage(text: str) -> Exception:
    from megatron_steel.errors import SteelError

    return SteelError("the command is not complete", "command line", text)
