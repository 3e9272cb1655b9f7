"""Fixed networks of losses and metrics: VGG16, AlexNet, Inception. The user supplies their weights as files."""
