"""Tiny networks of the kinds that people fine-tune, each with a batch of data and a schedule of three phases."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

ROWS, LENGTH = 24, 7
Data = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """A network, the data of its rows, the loss of a batch, and what each phase thaws."""

    build: Callable[[], nn.Module]
    data: Callable[[torch.Generator], Data]
    loss: Callable[[nn.Module, Data], Tensor]
    phases: tuple[str, ...]


class Block(nn.Module):
    def __init__(self, width: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, dropout=dropout, batch_first=True)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Dropout(dropout), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class Encoder(nn.Module):
    """Blocks called by the model itself, between an embedding with positions of its own and a head."""

    def __init__(self, blocks: int = 12, width: int = 16) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, width)
        self.positions = nn.Parameter(torch.randn(1, LENGTH, width) * 0.02)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.head = nn.Linear(width, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(dim=1))


class Convolutions(nn.Module):
    """BatchNorm, activations in place and residual connections, as in torchvision's ResNet."""

    class Residual(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
            self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
            self.relu = nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            out = self.relu(self.bn1(self.conv1(x)))
            out = self.bn2(self.conv2(out))
            out += x
            return self.relu(out)

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(2)
        self.layer1 = nn.Sequential(self.Residual(4), self.Residual(4))
        self.layer2 = nn.Sequential(self.Residual(4), self.Residual(4))
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.relu(self.bn(self.conv(x))))
        return self.fc(self.layer2(self.layer1(x)).mean(dim=(2, 3)))


class SkipConnections(nn.Module):
    """A U-Net: what the frozen way down gives is read again on the trained way up."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = nn.Conv1d(2, 4, 3, padding=1), nn.Conv1d(4, 8, 3, padding=1)
        self.middle = nn.Conv1d(8, 8, 3, padding=1)
        self.up1, self.up2 = nn.Conv1d(16, 4, 3, padding=1), nn.Conv1d(8, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        first = torch.relu(self.down1(x))
        second = torch.relu(self.down2(first))
        middle = torch.relu(self.middle(second))
        up = torch.relu(self.up1(torch.cat([middle, second], dim=1)))
        return self.up2(torch.cat([up, first], dim=1))


class Recurrent(nn.Module):
    """Rows in the second dimension, and states beside the output."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 8)
        self.lower, self.upper = nn.LSTM(8, 8), nn.LSTM(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        states, carried = self.lower(self.embedding(ids.t()))
        _, (last, _) = self.upper(states, carried)
        return self.head(last[-1])


def text(generator: torch.Generator) -> Data:
    lengths = torch.randint(3, LENGTH + 1, (ROWS,), generator=generator)
    mask = (torch.arange(LENGTH) < lengths[:, None]).long()
    ids = torch.randint(2, 50, (ROWS, LENGTH), generator=generator) * mask
    return {"input_ids": ids, "attention_mask": mask, "labels": classes(generator)}


def translations(generator: torch.Generator) -> Data:
    return {**text(generator), "labels": torch.randint(2, 50, (ROWS, 4), generator=generator)}


def language(generator: torch.Generator) -> Data:
    ids = torch.randint(2, 50, (ROWS, LENGTH), generator=generator)
    return {"input_ids": ids, "labels": ids}


def images(generator: torch.Generator) -> Data:
    return {"pixel_values": torch.randn(ROWS, 3, 8, 8, generator=generator), "labels": classes(generator)}


def signals(generator: torch.Generator) -> Data:
    return {"x": torch.randn(ROWS, 2, 8, generator=generator), "labels": torch.randn(ROWS, 1, 8, generator=generator)}


def classes(generator: torch.Generator) -> Tensor:
    return torch.randint(0, 3, (ROWS,), generator=generator)


def by_itself(model: nn.Module, batch: Data) -> Tensor:
    """The loss of a transformers model."""
    return model(**batch).loss


def of_classes(model: nn.Module, batch: Data) -> Tensor:
    inputs = batch["input_ids"] if "input_ids" in batch else batch["pixel_values"]
    return nn.functional.cross_entropy(model(inputs), batch["labels"])


def of_signals(model: nn.Module, batch: Data) -> Tensor:
    return nn.functional.mse_loss(model(batch["x"]), batch["labels"])


def transformer(name: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        return getattr(transformers, name)(getattr(transformers, config)(**options))

    return build


SMALL = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
TEXT = {**SMALL, "vocab_size": 50, "max_position_embeddings": 16, "num_labels": 3, "pad_token_id": 0}
T5 = {
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 32,
    "num_layers": 2,
    "num_heads": 2,
    "vocab_size": 50,
    "decoder_start_token_id": 0,
}

CASES: Mapping[str, Case] = {
    "encoder": Case(Encoder, lambda g: {**text(g)}, of_classes, ("head.*", r"blocks\.11\..*", r"blocks\.(9|10)\..*")),
    "bert": Case(
        transformer("BertForSequenceClassification", "BertConfig", **TEXT),
        text,
        by_itself,
        ("classifier.*", r"bert\.pooler.*|bert\.encoder\.layer\.3\..*", r"bert\.encoder\.layer\.2\..*"),
    ),
    "deberta": Case(
        transformer(
            "DebertaV2ForSequenceClassification",
            "DebertaV2Config",
            **TEXT,
            relative_attention=True,
            pos_att_type=["p2c", "c2p"],
            position_biased_input=False,
            norm_rel_ebd="layer_norm",
            share_att_key=True,
            max_relative_positions=8,
        ),
        text,
        by_itself,
        ("classifier.*|pooler.*", r"deberta\.encoder\.layer\.3\..*", r"deberta\.encoder\.layer\.2\..*"),
    ),
    "vit": Case(
        transformer("ViTForImageClassification", "ViTConfig", **SMALL, image_size=8, patch_size=4, num_labels=3),
        images,
        by_itself,
        ("classifier.*", r"vit\.layernorm.*|vit\..*layers?\.3\..*", r"vit\..*layers?\.2\..*"),
    ),
    "gpt2": Case(
        transformer(
            "GPT2LMHeadModel",
            "GPT2Config",
            n_embd=16,
            n_layer=4,
            n_head=2,
            n_positions=16,
            vocab_size=50,
            use_cache=False,
        ),
        language,
        by_itself,
        (r"transformer\.ln_f.*", r"transformer\.h\.3\..*", r"transformer\.h\.2\..*"),
    ),
    "t5": Case(
        transformer("T5ForConditionalGeneration", "T5Config", **T5, use_cache=False),
        translations,
        by_itself,
        (r"decoder\.final_layer_norm.*", r"decoder\.block\.1\..*", r"decoder\.block\.0\..*"),
    ),
    "llama": Case(
        transformer("LlamaForCausalLM", "LlamaConfig", **{**SMALL, "vocab_size": 50}, use_cache=False),
        language,
        by_itself,
        ("lm_head.*", r"model\.norm.*|model\.layers\.3\..*", r"model\.layers\.2\..*"),
    ),
    "resnet": Case(Convolutions, images, of_classes, ("fc.*", r"layer2\.1\..*", r"layer2\.0\..*")),
    "unet": Case(SkipConnections, signals, of_signals, ("up2.*", "up1.*", "middle.*")),
    "lstm": Case(Recurrent, text, of_classes, ("head.*", "upper.*", "lower.*")),
}
