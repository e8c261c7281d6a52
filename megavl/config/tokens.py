"""Special tokens by their spellings, and the label that is no token.

END_OF_SEQUENCE: in the order in which a vocabulary is searched for them: DeepSeek's, Llama's, GPT-2's
PLACEHOLDERS:    of each family, the token that stands where an image does
VL2:             what a DeepSeek-VL2 model is trained with besides (processing_deepseek_vl_v2.py of the released code)
IGNORE_INDEX:    label of a position where nothing is supervised: the default `ignore_index` of torch's cross entropy,
                 and `ignore_id` of the released configurations
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
