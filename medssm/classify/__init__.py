"""Classification of whole images: `medssm train --task classify`, and predict and evaluate for what it trained.

    from medssm.classify.train import train
    from medssm.classify.predict import predict
    from medssm.classify.evaluate import evaluate

Files, loop, networks' folders and pages are those of `medssm.segment`.
"""
