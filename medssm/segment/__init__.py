"""Train, predict and evaluate on real files: MONAI transforms and losses, a Lightning Fabric loop, image files in and out.

    from medssm.segment.train import train
    from medssm.segment.predict import predict
    from medssm.segment.evaluate import evaluate

Each of these modules is also a subcommand of `medssm`. Nothing here is imported by `import medssm`.
"""
