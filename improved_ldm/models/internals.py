"""The private parts of diffusers that the denoisers need, in one place."""

from improved_ldm.compatibility import private_parts

TransformerBlockMetadata, TransformerBlockRegistry = private_parts(
    "diffusers", "hooks._helpers", "TransformerBlockMetadata", "TransformerBlockRegistry"
)
