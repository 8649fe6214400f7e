-- Optional columns of the platform's table md_training_task, for MySQL 5.7+ and MariaDB 10.3+.
-- Run it in the platform's schema. It can be repeated: an existing column is not changed.
--     mysql -u root -p platform < docs/md_training_task.sql
-- (MySQL has no ADD COLUMN IF NOT EXISTS; the prepared statement works on both.)

SET @change = IF(
    (SELECT COUNT(*) FROM information_schema.columns
     WHERE table_schema = DATABASE() AND table_name = 'md_training_task' AND column_name = 'student_model_type') = 0,
    'ALTER TABLE md_training_task ADD COLUMN student_model_type VARCHAR(50) NULL COMMENT ''resnet, vit, yolov8, unet, lstm''',
    'DO 0');
PREPARE change_statement FROM @change;
EXECUTE change_statement;
DEALLOCATE PREPARE change_statement;

SET @change = IF(
    (SELECT COUNT(*) FROM information_schema.columns
     WHERE table_schema = DATABASE() AND table_name = 'md_training_task' AND column_name = 'student_model_size') = 0,
    'ALTER TABLE md_training_task ADD COLUMN student_model_size VARCHAR(50) NULL COMMENT ''resnet18, vit-tiny, n, small and the like''',
    'DO 0');
PREPARE change_statement FROM @change;
EXECUTE change_statement;
DEALLOCATE PREPARE change_statement;

SET @change = IF(
    (SELECT COUNT(*) FROM information_schema.columns
     WHERE table_schema = DATABASE() AND table_name = 'md_training_task' AND column_name = 'task_type') = 0,
    'ALTER TABLE md_training_task ADD COLUMN task_type VARCHAR(50) DEFAULT ''classification'' COMMENT ''classification, detection, segmentation, features''',
    'DO 0');
PREPARE change_statement FROM @change;
EXECUTE change_statement;
DEALLOCATE PREPARE change_statement;

SET @change = IF(
    (SELECT COUNT(*) FROM information_schema.columns
     WHERE table_schema = DATABASE() AND table_name = 'md_training_task' AND column_name = 'num_classes') = 0,
    'ALTER TABLE md_training_task ADD COLUMN num_classes INT DEFAULT 10 COMMENT ''classes of the head, at least those of the data''',
    'DO 0');
PREPARE change_statement FROM @change;
EXECUTE change_statement;
DEALLOCATE PREPARE change_statement;
