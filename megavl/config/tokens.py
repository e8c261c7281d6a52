"""Spellings of special tokens, and the label of positions without supervision.

END_OF_SEQUENCE: in the order in which a vocabulary is searched for them: DeepSeek's, Llama's, GPT-2's
PLACEHOLDERS:    of each family, the token that stands where an image does
VL2:             what a DeepSeek-VL2 model is trained with besides (processing_deepseek_vl_v2.py of the released code)
IGNORE_INDEX:    label of a position whose next token is not trained on
"""

END_OF_SEQUENCE = ("<｜end▁of▁sentence｜>", "</s>", "<|endoftext|>")
PLACEHOLDERS = {"vl": "<image_placeholder>", "vl2": "<image>"}
VL2 = (
    "<|ref|>",
    "<|/ref|>",
    "<|det|>",
    "<|/det|>",
    "<|grounding|>",
    "<|User|>",
    "<|Assistant|>",
    PLACEHOLDERS["vl2"],
)
IGNORE_INDEX = -100
