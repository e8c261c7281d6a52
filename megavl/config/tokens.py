"""Spellings of the end-of-sequence token, in the order in which a vocabulary is searched for them: DeepSeek's, Llama's,
GPT-2's."""

END_OF_SEQUENCE = ("<｜end▁of▁sentence｜>", "</s>", "<|endoftext|>")
