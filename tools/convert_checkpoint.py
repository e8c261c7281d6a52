"""Convert checkpoints to and from the Hugging Face layouts.

    python tools/convert_checkpoint.py to-hf --checkpoint runs/NAME/checkpoints --output DIR --layout transformers
    python tools/convert_checkpoint.py to-hf --checkpoint runs/NAME/checkpoints --output DIR --layout deepseek
    python tools/convert_checkpoint.py from-hf --input DIR --output DIR

docs/checkpoints.md says what each layout holds and what is not carried.
"""

import argparse
import sys


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    out = commands.add_parser("to-hf", help="a checkpoint of megavl -> safetensors, config and processor files")
    out.add_argument(
        "--checkpoint", required=True, help="a checkpoint, or a run's directory of them (the latest is taken)"
    )
    out.add_argument("--output", required=True, help="directory that is made; it must not be there yet")
    out.add_argument(
        "--layout",
        choices=["transformers", "deepseek"],
        required=True,
        help="deepseek is the released code's, the one of DeepSeek-VL2",
    )
    out.add_argument("--tokenizer", help="sentencepiece .model or tokenizer.json; default: the run's own")
    out.add_argument(
        "--max-shard-size", type=float, default=5.0, metavar="GB", help="of one safetensors file; default 5"
    )
    into = commands.add_parser("from-hf", help="safetensors of any layout -> a checkpoint that starts a run")
    into.add_argument("--input", required=True, help="directory with config.json and safetensors files")
    into.add_argument("--output", required=True, help="directory of checkpoints; step_00000000 is made in it")
    arguments = parser.parse_args()

    # Imported here: help and refused options need not wait 2 s for torch.
    from megavl.checkpoint.error import CheckpointError
    from megavl.checkpoint.hf import from_hf, to_hf

    try:
        if arguments.command == "to-hf":
            shard_bytes = int(arguments.max_shard_size * 1e9)
            to_hf(
                arguments.checkpoint,
                arguments.output,
                arguments.layout,
                arguments.tokenizer,
                shard_bytes,
                _print_indented,
            )
            print(f"{arguments.output}: {arguments.layout} layout")
        else:
            print(f"{from_hf(arguments.input, arguments.output)}: start a run from it with checkpoint.init_from")
    except (CheckpointError, OSError) as error:
        sys.exit(f"convert_checkpoint: {error}")


def _print_indented(line: str) -> None:
    print(f"  {line}", flush=True)


if __name__ == "__main__":
    main()
