"""A trained baseline beside the losses that its originals show."""

import pandas as pd

# Source: the video "Let's build GPT", after its last run; nanoGPT's README at 3adf61e, "quick start".
SHOWN = {"the video": "1.48, a mean over random validation batches", "nanoGPT": "1.4697, the best of its sampled evaluations"}


def render_baseline(cells: pd.DataFrame) -> str:
    """Write each cell's losses beside what is shown elsewhere, or say how far it is."""
    lines = []
    for row in cells.to_dict("records"):
        if row["state"] != "done":
            lines.append(f"{row['cell_id']}: {row['state']}; the same command goes on")
            continue
        losses = (
            f"val_loss {row['val_loss']:.4f} at the end, {row['val_loss_best']:.4f} at its best, on the full validation split"
        )
        where = f"{row['train_s']:,.0f} s of training on {row['device_name']}, {row['tokens_per_s']:,.0f} tokens/s"
        lines.append(f"{row['cell_id']}: {losses}; {where}")
    return "\n".join([*lines, *(f"shown by {who}: {what}" for who, what in SHOWN.items())])
