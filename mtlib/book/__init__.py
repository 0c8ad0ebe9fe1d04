"""What the pages of the book need: scale, device, claims, tables, and recorded results."""
