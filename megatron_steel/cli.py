"""`megatron-steel VERB`: the arguments of each verb; what it does is in `verbs`.

Nothing heavy is imported before a verb runs, so that `--help` is instant.
"""

import argparse
import difflib
import re
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

from megatron_steel import __version__, dist, verbs
from megatron_steel.errors import EXIT_BAD_INPUT, SteelError

AddVerb = Callable[..., argparse.ArgumentParser]


def main(argv: list[str] | None = None) -> int:
    """Run one verb; returns its exit code (0 done, 70 internal, 75 stopped on request, 78 bad input, 130 interrupted)."""
    parser = _parser()
    known, rest = parser.parse_known_args(argv)
    if rest and (
        known.action not in (verbs.pretrain, verbs.launch, verbs.plan, verbs.sft, verbs.dpo)
        or any(word.startswith("-") for word in rest)
    ):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    arguments = vars(known)
    if rest:  # overrides that stand behind --dry-run
        arguments["overrides"] = [*known.overrides, *rest]
    action: Callable[..., None] = arguments.pop("action")
    dist.set_up_logging()
    try:
        return dist.exit_code(lambda: action(**arguments))
    except KeyboardInterrupt:  # of a verb that has nothing to save, or for the second time
        dist.log.error("interrupted")
        return 128 + signal.SIGINT


class Parser(argparse.ArgumentParser):
    """A command that cannot be read is bad configuration, as a recipe is: told in the same words, and 78, where argparse has 2."""

    def error(self, message: str) -> NoReturn:
        unknown = re.match(r"argument VERB: invalid choice: '(.*?)' \(choose from (.*)\)", message)
        remedy = f"`{self.prog} --help` says what it takes"
        if unknown:
            near = difflib.get_close_matches(unknown[1], re.findall(r"[\w-]+", unknown[2]), n=1)
            message = f"there is no verb {unknown[1]!r}"
            remedy = f"did you mean {near[0]}? {remedy}" if near else remedy
        self.exit(EXIT_BAD_INPUT, f"error: {SteelError(message, self.prog, remedy)}\n")


def _parser() -> argparse.ArgumentParser:
    parser = Parser("megatron-steel", formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=__version__)
    subparsers = parser.add_subparsers(required=True, metavar="VERB", help="its own arguments: VERB --help")
    lines = ["Pretrain small language models and ship them."]

    def group(title: str) -> AddVerb:
        lines.append(f"\n{title}:")

        def verb(action: Callable[..., None], help: str, name: str = "") -> argparse.ArgumentParser:
            name = name or action.__name__.replace("_", "-")
            lines.append(f"  {name:16} {help}")
            sub = subparsers.add_parser(name, description=help)  # without `help`, which would list it once more
            sub.set_defaults(action=action)
            return sub

        return verb

    _data(group("data"))
    _training(group("training"))
    _after_training(group("after training"))
    _looking(group("inspect and operate"))
    parser.description = "\n".join(lines)
    parser.epilog = (
        "exit codes: 0 done, 70 internal or numerical, 75 stopped on request (start again), 78 bad configuration or data,\n"
        "130 interrupted"
    )
    return parser


def _training(verb: AddVerb) -> None:
    p = verb(verbs.pretrain, "train a recipe in one process")
    p.add_argument("recipe", metavar="RECIPE", help="a shipped name or a YAML path")
    p.add_argument("overrides", nargs="*", default=[], metavar="key.path=value")
    p.add_argument(
        "--dry-run", action="store_true", help="check everything, make two timed steps, print the plan, keep nothing"
    )

    p = verb(verbs.launch, "train a recipe on every GPU (two ranks without one), supervised: start again after a crash")
    p.add_argument("recipe", metavar="RECIPE", help="a shipped name or a YAML path")
    p.add_argument("overrides", nargs="*", default=[], metavar="key.path=value")
    p.add_argument("--num_gpus", type=int, metavar="N", help="ranks on each node (default: one per GPU)")
    p.add_argument("--hostfile", metavar="F", help="several nodes, one line each: HOSTNAME slots=GPUS")

    p = verb(verbs.plan, "memory, time, disk and cost of a recipe on a machine, before you rent it (docs/plan.md)")
    p.add_argument("recipe", nargs="?", metavar="RECIPE", help="a shipped name or a YAML path; needs no data")
    p.add_argument("overrides", nargs="*", default=[], metavar="key.path=value")
    p.add_argument("--gpus", metavar="8xA100-80G", help="GPUs of one node, or NODESxGPUSxNAME as in 4x8xH100")
    p.add_argument(
        "--link", metavar="200Gb/s", help="what joins the nodes: speed of one node's network, all cards together"
    )
    p.add_argument(
        "--peak-tflops", type=float, metavar="N", help="dense bf16 peak of a GPU that the table does not have"
    )
    p.add_argument("--memory-gb", type=float, metavar="N", help="memory of a GPU that the table does not have")
    p.add_argument("--price", type=float, metavar="P", help="of one GPU for one hour, in your currency")
    p.add_argument("--check", action="store_true", help="the time model against published speeds, held-out rows first")
    p.add_argument("--data", nargs="+", default=[], metavar="SOURCE_OR_FILE",
                   help="hours and disk to prepare and tokenize these files, by timing a sample of them here")  # fmt: skip
    p.add_argument("--tokenizer", metavar="DIR_OR_MODEL", help="with --data: tokenize with it")
    p.add_argument("--chain", metavar="CHAIN", help="with --data: clean with it (text, code, ...)")
    p.add_argument("--cores", type=int, metavar="N", help="with --data: cores that will work (default: those here)")
    p.add_argument("--total-size", metavar="620GB", help="with --data: of the whole corpus these files are a part of")
    p.add_argument("--json", dest="json_file", metavar="FILE", help="write every figure here")

    p = verb(verbs.recipes, "list the shipped recipes, show one, or scale one down to try it out")
    p.add_argument("words", nargs="*", metavar="show NAME | scale NAME")
    p.add_argument("--params", metavar="N", help="with scale: how many parameters, as in 50m (within a tenth)")
    p.add_argument("--vocab-size", type=int, metavar="N", help="with scale: another vocabulary than the recipe's")
    p.add_argument("--output", metavar="FILE.yaml", help="with scale: write it here (default: print it)")


def _data(verb: AddVerb) -> None:
    p = verb(verbs.prepare, "files of a known corpus to one jsonl file of texts, or fetch the corpus from a hub")
    p.add_argument("source", metavar="SOURCE", help="skypile, zhihu-kol, messages, ...: docs/prepare.md has them all")
    p.add_argument("inputs", nargs="*", default=[], metavar="INPUT")
    p.add_argument("--output", metavar="FILE.jsonl")
    p.add_argument("--tokenizer", metavar="DIR", help="use this folder's chat template and special tokens")
    p.add_argument("--nfkc", action="store_true", help="fold full-width and compatibility characters (not for code)")
    p.add_argument("--min-upvotes", type=int, default=100, metavar="N", help="for zhihu-kol (default: 100)")
    p.add_argument("--decontaminate", nargs="+", default=[], metavar="BENCHMARK",
                   help="files or folders of benchmarks: report the rows that hold their questions")  # fmt: skip
    p.add_argument("--remove-contaminated", action="store_true", help="leave these rows out")
    p.add_argument("--workers", type=int, metavar="N", help="processes (default: one per core)")
    p.add_argument("--max-malformed-ratio", type=float, default=0.001, metavar="R",
                   help="fail where more than this share of the rows is broken (default: 0.001)")  # fmt: skip
    p.add_argument("--max-reject-ratio", type=float, default=1.0, metavar="R",
                   help="fail where more than this share of the rows is rejected (default: 1, never)")  # fmt: skip
    p.add_argument("--fetch", metavar="DIR", help="download the corpus into this folder instead")
    p.add_argument("--hub", choices=("huggingface", "modelscope"), default="huggingface", help="where --fetch looks")
    p.add_argument("--sample", metavar="SIZE", help="with --fetch: whole files up to this size, as in 1GB")

    p = verb(verbs.tokenize, "jsonl, parquet or text to PREFIX.bin/.idx")
    p.add_argument("inputs", nargs="+", metavar="INPUT")
    p.add_argument("--tokenizer", dest="tokenizer_path", required=True, metavar="DIR_OR_MODEL")
    p.add_argument("--output", dest="output_prefix", required=True, metavar="PREFIX")
    p.add_argument("--text-key", default="text", help="the column or key that holds the text (default: text)")
    p.add_argument("--prompt-key", metavar="KEY", help="with --response-key: pairs for an encoder-decoder, not texts")
    p.add_argument("--response-key", metavar="KEY", help="the column or key that holds the response")
    p.add_argument("--workers", type=int, metavar="N", help="processes (default: one per core)")
    p.add_argument("--validation-ratio", type=float, default=0.0,
                   help="share of documents for PREFIX-validation, chosen by content (default: 0)")  # fmt: skip
    p.add_argument("--max-malformed-ratio", type=float, default=0.001, metavar="R",
                   help="fail where more than this share of the rows is malformed (default: 0.001)")  # fmt: skip
    p.add_argument("--min-tokens", type=int, default=0, metavar="N", help="leave out documents with fewer tokens")
    p.add_argument("--min-chars", type=int, default=0, metavar="N", help="leave out documents with fewer characters")
    p.add_argument("--shuffle", action="store_true", help="permute the documents, for corpora that lie sorted")
    p.add_argument("--seed", type=int, default=0, help="which permutation (default: 0)")

    p = verb(verbs.clean, "clean and deduplicate jsonl with data-juicer, every row accounted for (docs/clean.md)")
    p.add_argument("inputs", nargs="+", metavar="INPUT.jsonl")
    p.add_argument("--chain", required=True, metavar="CHAIN",
                   help="text, code, text-original, code-original, or a YAML file")  # fmt: skip
    p.add_argument("--output", required=True, metavar="FILE.jsonl")
    p.add_argument("--workers", type=int, metavar="N", help="processes (default: one per core)")
    p.add_argument("--report", metavar="FILE.json", help="write the account here, and as a table to FILE.md")
    p.add_argument("--picture", metavar="FILE.png", help="draw what each operator dropped of each source")
    p.add_argument("--models", metavar="DIR", help="local files of operators that would download them")
    p.add_argument("--python", metavar="PATH", help="interpreter of data-juicer's environment (default: its own)")
    p.add_argument("--ray", nargs="?", const="local", metavar="ADDRESS",
                   help="run on Ray: a cluster that shares this file system (default: start one here)")  # fmt: skip

    p = verb(verbs.train_tokenizer, "train a sentencepiece BPE tokenizer and write it as a Hugging Face folder")
    p.add_argument("inputs", nargs="+", metavar="INPUT")
    p.add_argument("--output", required=True, metavar="DIR")
    p.add_argument("--vocab-size", type=int, required=True)
    p.add_argument("--compare", nargs="*", default=[], metavar="DIR", help="measure these tokenizers on the same text")

    p = verb(verbs.prune_tokenizer, "a tokenizer with fewer ids: those that tokenized data uses most")
    p.add_argument("source", metavar="DIR")
    p.add_argument("--data", dest="prefixes", nargs="+", required=True, metavar="PREFIX", help="what it tokenized")
    p.add_argument("--vocab-size", type=int, required=True)
    p.add_argument("--output", required=True, metavar="DIR")

    p = verb(verbs.merge, "join data sets into one")
    p.add_argument("prefixes", nargs="+", metavar="PREFIX")
    p.add_argument("--output", required=True, metavar="PREFIX")


def _after_training(verb: AddVerb) -> None:
    p = verb(
        verbs.export, "write a checkpoint as a Hugging Face folder (also others' ZeRO checkpoints: docs/export.md)"
    )
    p.add_argument("source", metavar="RUN_OR_CHECKPOINT")
    p.add_argument("output", metavar="OUT_DIR")
    p.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    p.add_argument("--verify", action="store_true", help="reload in a fresh process and compare logits")
    p.add_argument("--average", type=int, default=1, metavar="K", help="the mean of a run's last K whole checkpoints")
    p.add_argument(
        "--model", metavar="HF_DIR", help="what a checkpoint of another trainer is of: config.json, tokenizer"
    )
    p.add_argument("--tokenizer", metavar="DIR_OR_MODEL", help="where the tokenizer of the training lies now")
    p.add_argument("--cut-padding", action="store_true", help="leave out rows of the vocabulary that are no token's")
    p.add_argument("--license", dest="license_id", metavar="ID", help="for the model card, as in apache-2.0")

    p = verb(
        verbs.import_hf,
        "make a published model a folder to start from (Steel-LLM: in this package's own form)",
        "import",
    )
    p.add_argument("source", metavar="HF_DIR")
    p.add_argument("output", metavar="OUT_DIR")
    p.add_argument(
        "--tokenizer", metavar="DIR_OR_MODEL", help="give the model this one: rows by piece, or by kept_ids.json"
    )
    p.add_argument(
        "--vocab-size", type=int, metavar="N", help="rows of the embedding (default: the new tokenizer's ids)"
    )
    p.add_argument("--layers", metavar="I,J,...", help="only these, in this order; -1 is the last: --layers=0,1,-2,-1")
    p.add_argument("--trust-code", action="store_true", help="run foreign modelling code that lies in the folder")

    p = verb(verbs.resample, "documents for another round of pretraining, likelier where the model's loss is high")
    p.add_argument("model", metavar="HF_DIR")
    p.add_argument("prefixes", nargs="+", metavar="PREFIX")
    p.add_argument("--output", required=True, metavar="PREFIX")
    p.add_argument("--share", type=float, required=True, metavar="S", help="of the documents, as 0.5")
    p.add_argument("--seed", type=int, default=0, metavar="N")
    p.add_argument(
        "--sequence-length",
        type=int,
        metavar="L",
        help="tokens the model sees at a time (default: its most, up to 2048)",
    )
    p.add_argument("--trust-code", action="store_true", help="run foreign modelling code that lies in the folder")

    p = verb(
        verbs.sft_data, "published instruction, preference or question sets to one mixture for TRL and LLaMA-Factory"
    )
    p.add_argument("spec", metavar="SPEC.yaml", help="which sets, how much of each: docs/sft_data.md")
    p.add_argument("--output", required=True, metavar="DIR")
    p.add_argument("--force-test-splits", action="store_true", help="train on test splits of benchmarks all the same")
    p.add_argument("--workers", type=int, metavar="N", help="processes (default: one per core)")

    p = verb(verbs.sft, "fine-tune a model on conversations: docs/sft.md (extra: sft)")
    _tuning(p, "messages", 256, "SFTConfig, as learning_rate=1e-5 (default: 2e-5, 4 epochs, cosine)")
    p.add_argument("--packing", action="store_true", help="several conversations in a row, unseen by each other")

    p = verb(verbs.dpo, "tune a model on preferences, by DPO: docs/sft.md (extra: sft)")
    _tuning(p, "preferences", 128, "DPOConfig, as beta=0.05 (default: beta 0.1, 5e-6, 3 epochs)")

    p = verb(verbs.generate, "let an exported model write")
    p.add_argument("model", metavar="HF_DIR")
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt")
    what.add_argument("--chat", action="store_true", help="talk with it: one line a turn, /exit or Ctrl-D ends")
    p.add_argument("--max-new-tokens", type=int, default=64)
    p.add_argument("--greedy", action="store_true", help="always the likeliest token (default: sample)")
    p.add_argument("--trust-code", action="store_true", help="run foreign modelling code that lies in the folder")

    p = verb(verbs.evaluate, "score models with lm-evaluation-harness (extra: eval) or by their written answers")
    p.add_argument("models", nargs="+", metavar="HF_DIR", help="a model, or a folder of models (a run, its exports)")
    p.add_argument("--tasks", required=True, help="comma-separated, for example ceval-valid,cmmlu,mmlu")
    p.add_argument(
        "--data", metavar="DIR", help="a local folder that holds ceval-exam/, cmmlu/, mmlu/, or one of these"
    )
    p.add_argument("--json", metavar="FILE", help="write the scores here too")
    p.add_argument("--protocol", default="loglikelihood", metavar="NAME",
                   help="loglikelihood (default), steel-chat (0-shot chat, answers in writing), or both")  # fmt: skip
    p.add_argument("--max-new-tokens", type=int, metavar="N", help="longest reply (default: the protocol's own)")
    p.add_argument("--items", metavar="FILE", help="write one JSON line a question here")
    p.add_argument("--tensorboard", metavar="DIR", help="write the scores against the exports' steps here")
    p.add_argument("--picture", metavar="FILE", help="write a bar chart beside published scores here (PNG)")
    p.add_argument("--trust-code", action="store_true", help="run foreign modelling code that lies in the folder")


def _looking(verb: AddVerb) -> None:
    p = verb(verbs.verify, "read a data set from end to end and compare it with its manifest")
    p.add_argument("prefixes", nargs="+", metavar="PREFIX")

    p = verb(verbs.inspect, "what a data set or a run folder is")
    p.add_argument("target", metavar="PREFIX_OR_RUN")
    p.add_argument("--tokenizer", metavar="DIR_OR_MODEL", help="show text, not ids (of a run: instead of the recipe's)")
    p.add_argument("--step", type=int, metavar="N", help="of a run: every sample of step N, its documents and text")
    p.add_argument("--rank", type=int, metavar="R", help="with --step: only what rank R trains")
    p.add_argument("--json", dest="json_file", metavar="FILE", help="write every figure here")
    p.add_argument("--picture", metavar="FILE", help="of a data set: write a PNG here")

    p = verb(verbs.audit, "can the model see the future, what is its honest loss, do its FFNs work")
    p.add_argument("source", metavar="HF_DIR_OR_CHECKPOINT")
    p.add_argument("--data", metavar="PREFIX", help="a data set for the losses (default: random tokens)")
    p.add_argument("--json", dest="json_file", metavar="FILE", help="write every figure here")
    p.add_argument("--picture", metavar="FILE", help="write a PNG here")
    p.add_argument("--trust-code", action="store_true", help="run foreign modelling code that lies in the folder")

    p = verb(verbs.report, "a run as one HTML page: curves, texts, where the time went, cost (docs/monitoring.md)")
    p.add_argument("run", metavar="RUN", help="a run folder: complete, going on, or crashed")
    p.add_argument("--output", metavar="FILE.html", help="default: report.html in the run folder")
    p.add_argument("--price-per-gpu-hour", type=float, metavar="X", help="adds the cost, in the currency of X")


def _tuning(p: argparse.ArgumentParser, rows: str, batch: int, keys: str) -> None:
    p.add_argument("model", metavar="MODEL_DIR")
    p.add_argument("data", metavar="DATA", help=f"a folder of sft-data, or a jsonl file of {rows}")
    p.add_argument("overrides", nargs="*", default=[], metavar="key=value", help=f"TRL's {keys}")
    p.add_argument(
        "--output", required=True, metavar="DIR", help="the tuned model; the same command goes on with a stopped run"
    )
    p.add_argument(
        "--global-batch-size", dest="global_batch", type=int, metavar="N", help=f"rows a step (default: {batch})"
    )
    p.add_argument("--num_gpus", type=int, metavar="N", help="ranks (default: one per GPU)")
    p.add_argument(
        "--deepspeed", metavar="FILE", help="zero2.json, zero3.json, ...: a file of ds_configs by path or name"
    )
    p.add_argument(
        "--lora", nargs="?", const="", metavar="r=16", help="train adapters of this rank, then join them with the model"
    )
    p.add_argument("--trust-code", action="store_true", help="run foreign modelling code that lies in the folder")


if __name__ == "__main__":
    sys.exit(main())
