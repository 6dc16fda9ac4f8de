"""Stage 3, on a CPU: a small umT5 learns which words of a prompt mean something.

python -m training.text --folder .train --minutes 4
"""

import io
import logging
import random
from functools import partial
from pathlib import Path

import sentencepiece
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import UMT5Config, UMT5EncoderModel

from training.graphs import Gradients
from training.prompts import NAMED, Wish, among_strangers, draw_wish, vocabulary, write
from training.run import Losses, minimise, read_weights, stage_parser
from training.sizes import DEMO, TEXT
from training.speech.sounds import WORDS
from training.world.looks import KINDS

log = logging.getLogger(__name__)

PAD, END = 0, 1
TOKENIZER = "spiece.model"


def train_tokenizer() -> bytes:
    """Folds case, so that "Anime" and "anime" are one word."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*vocabulary(), *(" ".join(words) for words in WORDS.values())]),
        model_writer=model,
        model_type="bpe",
        vocab_size=TEXT["vocab_size"] - 2,
        normalization_rule_name="nmt_nfkc_cf",
        character_coverage=1.0,
        byte_fallback=True,
        pad_id=PAD,
        eos_id=END,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def read_tokenizer(folder: Path) -> sentencepiece.SentencePieceProcessor:
    path = folder / TOKENIZER
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        path.write_bytes(train_tokenizer())
    return sentencepiece.SentencePieceProcessor(model_file=str(path))


def new_text_encoder() -> UMT5EncoderModel:
    config = UMT5Config(**TEXT, feed_forward_proj="gated-gelu", dropout_rate=0.0)
    return UMT5EncoderModel(config)


class Reader(nn.Module):
    """The text encoder, with a question about everything a prompt can name; the answers are only for training."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = new_text_encoder()
        width = TEXT["d_model"]
        self.answers = nn.ModuleDict({name: nn.Linear(width, 1 + len(words)) for name, words in NAMED.items()})

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        mask = (tokens != PAD).unsqueeze(-1)
        states = self.encoder(input_ids=tokens, attention_mask=mask[..., 0].long()).last_hidden_state
        pooled = (states * mask).sum(1) / mask.sum(1)
        return {name: answer(pooled) for name, answer in self.answers.items()}


def tokenize(tokenizer: sentencepiece.SentencePieceProcessor, prompts: list[str]) -> Tensor:
    """(B, longest) token ids with the end mark, as ComfyUI sends them; no more than the model takes."""
    rows = [[*tokenizer.encode(prompt), END][: DEMO.text_len] for prompt in prompts]
    longest = max(map(len, rows))
    return torch.tensor([row + [PAD] * (longest - len(row)) for row in rows])


@torch.no_grad()
def encode_prompts(encoder: UMT5EncoderModel, tokenizer, prompts: list[str]) -> Tensor:
    """(B, text_len, D), zeros after the end of each prompt."""
    tokens = tokenize(tokenizer, prompts).to(encoder.device)
    mask = tokens != PAD
    states = encoder(input_ids=tokens, attention_mask=mask.long()).last_hidden_state * mask.unsqueeze(-1)
    return F.pad(states, (0, 0, 0, DEMO.text_len - tokens.shape[1]))


def labels(wishes: list[Wish]) -> dict[str, Tensor]:
    """0 where a prompt does not name it."""
    return {
        name: torch.tensor([0 if (w := getattr(wish, name)) is None else 1 + list(words).index(w) for wish in wishes])
        for name, words in NAMED.items()
    }


def batch(tokenizer, step: int, size: int = 64) -> tuple[Tensor, dict[str, Tensor]]:
    generator = random.Random(step)
    wishes = [draw_wish(generator, generator.choice(KINDS)) for _ in range(size)]
    prompts = [among_strangers(write(wish, generator), generator) for wish in wishes]
    return tokenize(tokenizer, prompts), labels(wishes)


def losses(reader: Reader, tokens: Tensor, *wanted: Tensor) -> dict[str, Tensor]:
    """`wanted` in the order of NAMED."""
    answers = reader(tokens)
    parts = {name: F.cross_entropy(answers[name], label) for name, label in zip(NAMED, wanted, strict=True)}
    return {"loss": sum(parts.values()), **parts}


def main() -> None:
    parser = stage_parser(__doc__, minutes=4)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    tokenizer = read_tokenizer(options.folder)
    torch.manual_seed(0)
    reader = Reader()
    if weights := read_weights(options.folder, "text"):
        reader.load_state_dict(weights)
    gradients = Gradients(reader, partial(losses, reader))

    def learn(step: int) -> Losses:
        tokens, wanted = batch(tokenizer, step)
        return gradients(tokens, *(wanted[name] for name in NAMED))

    minimise(
        "text",
        reader,
        learn,
        options.folder,
        minutes=options.minutes,
        whole=options.whole,
        rate=2e-3,
    )
    tokens, wanted = batch(tokenizer, -1, 512)
    with torch.no_grad():
        right = {name: (a.argmax(1) == wanted[name]).float().mean().item() for name, a in reader(tokens).items()}
    log.info("text: share understood of unseen prompts: %s", {name: round(share, 3) for name, share in right.items()})


if __name__ == "__main__":
    main()
