"""Prove an export: the loss of megavl and of transformers on the same documents, and text generated from an image.

    python tools/check_export.py --checkpoint runs/NAME/checkpoints --hf DIR --data PREFIX [--image FILE] [--tokens N]

Both models compute in float32 from the stored weights. Exit code 1 where their losses differ. Of DeepSeek-VL2,
transformers has the language part: it gets the images' features from megavl's stem with the weights of the export.
"""

import argparse
import sys
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="a checkpoint, or a run's directory of them")
    parser.add_argument("--hf", type=Path, required=True, help="its export: of DeepSeek-VL in the transformers layout")
    parser.add_argument("--data", required=True, help="prefix of a dataset, text or multimodal")
    parser.add_argument("--image", type=Path, help="image from which the export generates text")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of the compared batch; default 2048")
    arguments = parser.parse_args()

    # Imported here: help and refused options need not wait 2 s for torch.
    from exports.compare import check

    from megavl.checkpoint.error import CheckpointError
    from megavl.data.errors import DataError

    try:
        agree = check(arguments.checkpoint, arguments.hf, arguments.data, arguments.image, arguments.tokens)
    except (CheckpointError, DataError, OSError) as error:
        sys.exit(f"check_export: {error}")
    if not agree:
        sys.exit("check_export: the losses differ: the export is not the model that was trained")


if __name__ == "__main__":
    main()
