"""DDPM and DDIM models, class-conditional ones too, with guidance."""
