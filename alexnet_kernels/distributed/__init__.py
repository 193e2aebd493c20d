"""How two towers run beside each other and what passes between them."""
