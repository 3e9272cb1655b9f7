"""Jobs on trained models: tokenizing, sampling, exporting, tables of several trainings."""
