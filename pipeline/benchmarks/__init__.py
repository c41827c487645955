"""Speed, measured side by side in one run: of training beside bare processes, of networks on a GPU beside a peer's."""
