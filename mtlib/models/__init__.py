"""Networks made elsewhere: image backbones, a sentence encoder, a detector."""
