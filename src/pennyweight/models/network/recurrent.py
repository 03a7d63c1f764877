"""LSTMs and GRUs stay calls that read their parameters; in train mode they drop out as torch's modules do."""

from __future__ import annotations

import torch
from torch import fx, nn

aten = torch.ops.aten
RECURRENT = (aten.lstm.input, aten.gru.input)


class Mode(nn.Module):
    """Gives whether it is in train mode."""

    def forward(self) -> bool:
        return self.training


def follow_mode(graph: fx.GraphModule) -> None:
    """Edit `graph`: LSTMs and GRUs with dropout between their layers ask for the mode, which the export wrote down."""
    recurrent = (*RECURRENT, aten.rnn_tanh.input, aten.rnn_relu.input)
    for node in graph.graph.nodes:
        if node.op != "call_function" or node.target not in recurrent:
            continue
        names = [argument.name for argument in node.target._schema.arguments]
        dropout, train = names.index("dropout"), names.index("train")
        if node.args[dropout] and not node.args[train]:
            path = f"{node.name}_mode"
            graph.add_module(path, Mode().eval())
            with graph.graph.inserting_before(node):
                mode = graph.graph.call_module(path)
            node.update_arg(train, mode)
