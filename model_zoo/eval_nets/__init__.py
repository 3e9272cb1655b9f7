"""Fixed networks of losses and metrics: VGG16, AlexNet, ConvNeXt-S, Inception, vision transformers. The user supplies
their weights as files."""
