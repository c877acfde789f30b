"""Where a long text may be split so that the pieces encode to the same tokens as the whole."""

import re

PIECE_CHARS = 1 << 12  # at least, in each piece; with 32,000 a character takes a tenth longer

# Between these two characters every pattern that lm knows (GPT-2, Qwen2, Llama 3) ends a word, so a
# cut here changes no token: after a single newline; before a single space between letters; and, for
# languages without spaces, before punctuation after a letter (one in every version of Unicode).
# Never before the start of a special token that may take the space before it: [MASK], <mask>.
SAFE_CUT = re.compile(
    r"(?<=\S\n)(?=[^\s\[<])|(?<=[^\W\d_])(?= [^\W\d_])"
    r"|(?<=[A-Za-zぁ-ゖァ-ヺ一-龥가-힣])(?=[,.;:!?，．。、；：！？])"
)
